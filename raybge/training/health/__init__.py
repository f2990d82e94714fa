"""State of a running training: progress and heartbeats of the workers."""
