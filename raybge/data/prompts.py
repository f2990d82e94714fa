"""Prompts: the text that precedes queries and passages before they are tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raybge.util.errors import UserError


@dataclass(frozen=True)
class Instructions:
    """Instructions of queries and passages, and how they are combined with the text.

    Args:
        query: instruction of queries; None: the model folder's prompt; "": no instruction.
        query_format: format with two {}, for the instruction and for the text.
        passage: instruction of passages, like `query`.
        passage_format: format like `query_format`.
        prompts: prompts of the model folder (`FolderSettings.prompts`): prefixes to which no format is applied.

    Raises:
        UserError: a format does not have two {}.
    """

    query: str | None = None
    query_format: str = "{}{}"
    passage: str | None = None
    passage_format: str = "{}{}"
    prompts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_format(self.query_format, "query_instruction_format")
        _check_format(self.passage_format, "passage_instruction_format")

    def query_text(self, text: str, prompt: str | None = None) -> str:
        """Return the query with the row's own `prompt`, else with `query`, else with the folder's prompt."""
        instruction = self.query if prompt is None else prompt
        return _instruct(self.query_format, instruction, text, self.prompts.get("query", ""))

    def passage_text(self, text: str) -> str:
        """Return the passage with `passage` as its instruction, else with the folder's prompt."""
        return _instruct(self.passage_format, self.passage, text, self.prompts.get("document", ""))

    def prefixes(self) -> dict[str, str]:
        """Return the prefixes of "query" and "document", the only form in which a model folder stores prompts.

        Raises UserError if a format puts something after the text.
        """
        mark = "\x00"
        texts = {"query": self.query_text(mark), "document": self.passage_text(mark)}
        for name, text in texts.items():
            if text.find(mark) != len(text) - 1:
                raise UserError(
                    f"the instruction format of a {name} must end with the text, found {text.replace(mark, '{}')!r}: "
                    "a model folder stores only prefixes"
                )
        return {name: text[:-1] for name, text in texts.items()}


def _instruct(instruction_format: str, instruction: str | None, text: str, prompt: str) -> str:
    if instruction is None:
        return prompt + text
    # a shell passes \n as two characters
    return instruction_format.replace("\\n", "\n").format(instruction, text) if instruction else text


def _check_format(instruction_format: str, name: str) -> None:
    try:
        text = instruction_format.format("\x01", "\x00")
    except (IndexError, KeyError, ValueError):
        text = ""
    if "\x00" not in text or "\x01" not in text:
        raise UserError(f"{name} {instruction_format!r}: expected two {{}}, for the instruction and for the text")
