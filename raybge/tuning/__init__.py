"""Hyperparameter search over training flags with Ray Tune."""
