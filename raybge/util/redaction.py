"""Redaction of secrets: values of secret flags, and credentials in URIs.

All messages, reports, model cards and records are redacted here. This module imports nothing of raybge.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECRET_FLAG = re.compile(r"(^|_)(token|password|secret|api_key)$")  # flag names
# `key:secret` before the "@" of s3://key:secret@bucket; a secret may contain a slash, as AWS's often do
LOGIN = r"(?:[^/@\s]+|[^:/@\s]+:[^@\s]*)"
_LOGIN = re.compile(rf"(://){LOGIN}@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:secret|token|password|key)[^=&\s]*=)[^&\s]*", re.IGNORECASE)
_VARIABLE = "RAYBGE_SECRET_WORDS"  # passes secret flags from a process to the one that replaces it


def redact(text: str) -> str:
    """Return a text without the credentials of its URIs."""
    return _QUERY.sub(r"\1…", _LOGIN.sub(r"\1…@", text))


def redact_settings(value: Any) -> Any:
    """Return nested settings without secret ones, and without the credentials of URIs."""
    if isinstance(value, Mapping):
        return {name: redact_settings(each) for name, each in value.items() if not SECRET_FLAG.search(str(name))}
    if isinstance(value, list | tuple):
        return [redact_settings(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def command_line() -> list[str]:
    """Return the arguments of this process's command line.

    `ps` shows the command line to all users of the machine, and Ray shows it in its list of jobs. So a process with a
    secret flag is replaced by one without, which receives the flag in an environment variable.
    """
    passed = os.environ.pop(_VARIABLE, None)
    if passed is not None:
        return [*sys.argv[1:], *json.loads(passed)]
    words, secret = _split_secrets(sys.orig_argv)
    if secret:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, words, {**os.environ, _VARIABLE: json.dumps(secret)})
    return sys.argv[1:]


def _split_secrets(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without secret flags, and the secret flags with their values."""
    visible: list[str] = []
    secret: list[str] = []
    expects_value = False  # the word before is a secret flag
    for word in words:
        name, mark, _ = word.removeprefix("--").partition("=")
        is_secret = word.startswith("--") and SECRET_FLAG.search(name) is not None
        hidden = is_secret or (expects_value and not word.startswith("--"))
        (secret if hidden else visible).append(word)
        expects_value = is_secret and not mark
    return visible, secret
