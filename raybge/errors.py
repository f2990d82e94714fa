"""The one error that a person is meant to read."""

import re

from raybge.secrets import public

_ORIGIN = re.compile(r"^([\w.]+: .+)\n+The above exception was the direct cause", re.MULTILINE)


class UserError(Exception):
    """Something the person can mend: a flag, a file, a row. Commands print the message alone and exit with 2.

    What a URI in the message holds to log in with is left out of it.
    """

    def __init__(self, message: str = ""):
        super().__init__(public(message))


def failure(error: BaseException) -> str:
    """The type and message of what went wrong, out of what Ray wraps around it."""
    if origin := _ORIGIN.search(str(error)):  # of a cause in one of its workers, Ray Data keeps the text alone
        return origin[1]
    while type(error).__module__.partition(".")[0] == "ray":
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """What an exception of another library says, without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
