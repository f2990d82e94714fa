"""Training rows and other input files: reading, checking, ordering, sampling and tokenizing them."""
