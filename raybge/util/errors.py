"""The one error that a person is meant to read."""

import re
from collections.abc import Iterator

from raybge.util.redaction import redact

_ORIGIN = re.compile(r"^([\w.]+: .+)\n+The above exception was the direct cause", re.MULTILINE)


class UserError(Exception):
    """Something the person can mend: a flag, a file, a row. Commands print the message alone and exit with 2.

    What a URI in the message holds to log in with is left out of it.
    """

    def __init__(self, message: str = ""):
        super().__init__(redact(message))


def failure_message(error: BaseException) -> str:
    """The type and message of what went wrong, out of what Ray wraps around it."""
    if origin := _ORIGIN.search(str(error)):  # of a cause in one of its workers, Ray Data keeps the text alone
        return origin[1]
    for each in causes(error):
        error = each
        if type(error).__module__.partition(".")[0] != "ray":
            break
    return f"{type(error).__name__}: {error}"


def causes(error: object) -> Iterator[BaseException]:
    """An exception and what caused it, as Ray and Python keep it, outermost first. Each once: Ray's can be in a circle,
    as of a run whose cluster is gone.
    """
    seen: list[BaseException] = []
    while isinstance(error, BaseException) and not any(error is before for before in seen):
        seen.append(error)
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def first_line(error: BaseException) -> str:
    """What an exception of another library says, without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
