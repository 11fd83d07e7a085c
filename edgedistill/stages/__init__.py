"""One file a stage, each readable from top to bottom."""
