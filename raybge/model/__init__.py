"""Models: encoders and cross-encoders, loaded, run and saved. Nothing here imports Ray."""
