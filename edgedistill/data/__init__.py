"""Prompt files, filters and their yields."""
