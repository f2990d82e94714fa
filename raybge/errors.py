"""The one error that a person is meant to read."""

from raybge.secrets import public


class UserError(Exception):
    """Something the person can mend: a flag, a file, a row. Commands print the message alone and exit with 2.

    What a URI in the message holds to log in with is left out of it.
    """

    def __init__(self, message: str = ""):
        super().__init__(public(message))


def cause_of(error: BaseException) -> BaseException:
    """What went wrong, out of what Ray wraps around it."""
    while type(error).__module__.partition(".")[0] == "ray":
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def first_line(error: BaseException) -> str:
    """What an exception of another library says, without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
