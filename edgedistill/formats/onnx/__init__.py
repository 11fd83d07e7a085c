"""ONNX: build a decoder folder for onnxruntime-genai, and prove that it is the model it was built from."""
