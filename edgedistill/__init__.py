"""Build small language models for a device: distil, merge, quantize, and verify on it before it ships."""

__version__ = "0.1.0"
