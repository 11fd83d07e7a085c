"""Runners answer prompts and give log-probabilities: one protocol (base.py), one file an engine."""
