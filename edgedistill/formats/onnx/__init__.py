"""ONNX: build a decoder for onnxruntime-genai and prove that it runs."""
