"""Backends that run a model outside of torch, on CPUs: ONNX Runtime and OpenVINO."""
