"""The one error that a person is meant to read."""


class UserError(Exception):
    """Something the person can mend: a flag, a file, a row. Commands print the message alone and exit with 2."""
