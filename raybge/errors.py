"""The one error that a person is meant to read."""


class UserError(Exception):
    """Something the person can mend: a flag, a file, a row. Commands print the message alone and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
