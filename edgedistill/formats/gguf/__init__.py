"""GGUF: convert, importance matrix, quantize, read, and the gate on each hop."""
