"""Training: fine-tuning and pre-training on Ray Train."""
