"""Encoding of rows as vectors."""
