"""Helpers without knowledge of the domain: errors, redaction, retries, file systems, atomic writes, digests."""
