"""Export of a model to ONNX or OpenVINO, as a folder that sentence-transformers opens."""
