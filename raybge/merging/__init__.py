"""Merging of models of one architecture by weighted averaging, slerp or TIES."""
