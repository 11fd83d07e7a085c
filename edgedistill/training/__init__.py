"""Losses, batches, adapters, shaping and the training loop."""
