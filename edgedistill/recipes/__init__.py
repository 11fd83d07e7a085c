"""Recipes that `edgedistill init` copies."""
