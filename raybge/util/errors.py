"""UserError, the one exception whose message is meant for the person at the command line."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from raybge.compat.library_versions import UnsupportedVersionError
from raybge.util.redaction import redact

_ORIGIN = re.compile(r"^([\w.]+: .+)\n+The above exception was the direct cause", re.MULTILINE)


class UserError(ValueError):
    """Error that the person can correct: a flag, a file, a row. Commands print its message alone and exit with 2.

    Credentials in URIs are removed from the message.
    """

    def __init__(self, message: str = ""):
        super().__init__(redact(message))


# Errors whose message says what to do: they are shown without a traceback, and no restart is tried.
CORRECTABLE = (UserError, UnsupportedVersionError)


def failure_message(error: BaseException) -> str:
    """Return type and message of the original error inside the exceptions that Ray wraps around it."""
    if origin := _ORIGIN.search(str(error)):  # Ray Data keeps only the text of a cause in one of its workers
        return origin[1]
    for each in causes(error):
        error = each
        if type(error).__module__.partition(".")[0] != "ray":
            break
    return f"{type(error).__name__}: {error}"


def causes(error: object) -> Iterator[BaseException]:
    """Yield an exception and its causes, as Ray and Python record them, outermost first.

    Each is yielded once: Ray's causes can form a circle, for example after the cluster is lost.
    """
    seen: list[BaseException] = []
    while isinstance(error, BaseException) and not any(error is before for before in seen):
        seen.append(error)
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def log_errors() -> Iterator[None]:
    """Log an error of the block and continue after it: of a page or an example, without which a run is complete."""
    try:
        yield
    except Exception:
        traceback.print_exc()
