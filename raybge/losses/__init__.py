"""Losses: pure functions of tensors, and the modules that training wraps. Nothing here imports Ray."""
