"""``python -m edgedistill``."""

from edgedistill.cli import main

main()
