"""Suites, metrics, intervals and the runners that answer a suite."""
