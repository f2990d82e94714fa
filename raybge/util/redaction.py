"""What nobody else is to see: the values of secret flags, and what a URI holds to log in with.

Messages, reports, cards and notes all go through here. Nothing is imported, so that everything may import it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECRET_FLAG = re.compile(r"(^|_)(token|password|secret|api_key)$")  # of a flag's name
# s3://key:secret@bucket; keys may hold a slash, and where they do, pyarrow refuses the URI and a message quotes it
_LOGIN = re.compile(r"(://)(?:[^/@\s]+|[^:/@\s]+:[^@\s]*)@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:secret|token|password|key)[^=&\s]*=)[^&\s]*", re.IGNORECASE)
_HANDED = "RAYBGE_SECRET_WORDS"  # in the environment, from a process to what it becomes


def redact(text: str) -> str:
    """A text without what its URIs hold to log in with."""
    return _QUERY.sub(r"\1…", _LOGIN.sub(r"\1…@", text))


def redact_settings(value: Any) -> Any:
    """Nested settings without the secret ones, their texts without what URIs hold to log in with."""
    if isinstance(value, Mapping):
        return {name: redact_settings(each) for name, each in value.items() if not SECRET_FLAG.search(str(name))}
    if isinstance(value, list | tuple):
        return [redact_settings(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def command_line() -> list[str]:
    """The words of this process's command line behind the program's name.

    `ps` shows them to everybody on the machine, and Ray to whoever sees its list of jobs. So a process that was given a
    secret flag is replaced by one without, to which it hands the flag in the environment.
    """
    handed = os.environ.pop(_HANDED, None)
    if handed is not None:
        return [*sys.argv[1:], *json.loads(handed)]
    words, secret = _apart(sys.orig_argv)
    if secret:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, words, {**os.environ, _HANDED: json.dumps(secret)})
    return sys.argv[1:]


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without secret flags, and these with their values."""
    open_: list[str] = []
    secret: list[str] = []
    waits = False  # for the value of a secret flag
    for word in words:
        name, mark, _ = word.removeprefix("--").partition("=")
        is_secret = word.startswith("--") and SECRET_FLAG.search(name) is not None
        hidden = is_secret or (waits and not word.startswith("--"))
        (secret if hidden else open_).append(word)
        waits = is_secret and not mark
    return open_, secret
