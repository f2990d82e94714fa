"""Writing, publishing and loading of checkpoints."""
