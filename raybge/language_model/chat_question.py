"""Questions to a language model, and the check of its answers: both are data, never instructions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_END_OF_REASONING = "</think>"


class InvalidAnswerError(Exception):
    """The model's answer does not have the requested form."""


@dataclass(frozen=True)
class ChatQuestion:
    """A question whose answer is a JSON object.

    Texts of the data are only ever part of `content`, which is sent as JSON: no text can end the string that quotes it.

    Args:
        instructions: the system message, the same for all questions of a kind.
        content: JSON value that the question is about.
        is_valid: returns True for an answer of the requested form; everything else is rejected.
    """

    instructions: str
    content: Any
    is_valid: Callable[[Any], bool]

    def messages(self) -> list[dict[str, str]]:
        """Return the messages of the request."""
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": json.dumps(self.content, ensure_ascii=False)},
        ]

    def answer(self, text: str) -> Any:
        """Return the JSON object in a model's text.

        Args:
            text: the model's text; reasoning, a sentence or a code fence may surround the object.

        Returns:
            The object.

        Raises:
            InvalidAnswerError: there is no such object, or not of the requested form.
        """
        text = text.rpartition(_END_OF_REASONING)[2]
        start, end = text.find("{"), text.rfind("}")
        try:
            value = json.loads(text[start : end + 1])
        except (ValueError, RecursionError) as error:
            raise InvalidAnswerError("the answer has no JSON object") from error
        if not self.is_valid(value):
            raise InvalidAnswerError("the answer does not have the requested form")
        return value
