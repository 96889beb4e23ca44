"""ONNX Runtime as a backend: it multiplies the checkpoint's own INT4 and INT8 words, passed with each call."""
