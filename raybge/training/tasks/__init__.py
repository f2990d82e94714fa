"""Training tasks: fine-tuning and pre-training."""
