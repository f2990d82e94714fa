"""ChatSpec: an endpoint for chat completions, checked before any request; and its key."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raybge.cli.checks import check_at_least
from raybge.cli.options import MineOptions
from raybge.util.errors import UserError
from raybge.util.redaction import redact

KEY_VARIABLE = "RAYBGE_API_KEY"  # not OPENAI_API_KEY, which would be sent to any other endpoint as well
_OWN_PARAMETERS = ("model", "messages", "stream", "n")


@dataclass(frozen=True)
class ChatSpec:
    """OpenAI-compatible endpoint and how it is asked. The key is not part of it: it stays in the environment.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: name of the model.
        concurrency: requests under way at a time.
        timeout: seconds until an answer must be complete.
        parameters: further fields of each request, such as temperature.
        flag: flag of the URL, for messages.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 120.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    flag: str = "--judge_url"

    @classmethod
    def from_options(cls, options: MineOptions) -> ChatSpec:
        """Check and read the flags of the judge.

        Args:
            options: the command's options; `judge_url` is set.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag or key.
        """
        url = options.judge_url or ""
        if redact(url) != url or "@" in urllib.parse.urlsplit(url).netloc:
            raise UserError(f"--judge_url contains credentials: put the key into the variable {KEY_VARIABLE} instead")
        if not _is_http(url):
            raise UserError(f"--judge_url must be a URL such as http://localhost:8000/v1, found «{url}»")
        if not options.judge_model:
            raise UserError("--judge_url requires --judge_model: the model's name at the endpoint")
        check_at_least(1, options, "judge_concurrency")
        if not 0 < options.judge_timeout < float("inf"):
            raise UserError(f"--judge_timeout must be above 0, found {options.judge_timeout:g}")
        parameters = {"temperature": 0} if options.judge_parameters is None else options.judge_parameters
        if own := [name for name in _OWN_PARAMETERS if name in parameters]:
            raise UserError(f"--judge_parameters must not contain {', '.join(own)}: raybge sets it")
        api_key()
        return cls(url, options.judge_model, options.judge_concurrency, options.judge_timeout, parameters)


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def api_key() -> str | None:
    """Return the endpoint's key from the environment; None if there is none, as for most local servers.

    Returns:
        The key.

    Raises:
        UserError: the variable holds something that cannot be sent as a key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"the variable {KEY_VARIABLE} must hold the key alone: printable ASCII without white space")
    return key or None
