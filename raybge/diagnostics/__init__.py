"""Checks of a machine: whether what raybge computes on it is right."""
