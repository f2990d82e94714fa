"""Retrieval evaluation: of finished models, in training, on MTEB; metrics, significance and report pages."""
