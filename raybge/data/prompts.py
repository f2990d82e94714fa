"""Prompts: the text that precedes queries and passages before they are tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raybge.util.errors import UserError


@dataclass(frozen=True)
class Instructions:
    """What is put around queries and passages before they are tokenised.

    Args:
        query, passage: the instruction; None is the folder's prompt, "" is none at all.
        query_format, passage_format: two {}, for the instruction and for the text.
        prompts: the folder's (`FolderSettings.prompts`): ready prefixes, so no format is applied to them.

    Raises UserError for a format that does not take both.
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
        """The query with its instruction: a row's own `prompt`, else `query`, else the folder's."""
        instruction = self.query if prompt is None else prompt
        return _instruct(self.query_format, instruction, text, self.prompts.get("query", ""))

    def passage_text(self, text: str) -> str:
        """The passage with its instruction: `passage`, else the folder's."""
        return _instruct(self.passage_format, self.passage, text, self.prompts.get("document", ""))

    def prefixes(self) -> dict[str, str]:
        """What comes before a "query" and a "document": all that a saved model can say.

        Raises UserError for a format that puts something behind the text.
        """
        mark = "\x00"
        texts = {"query": self.query_text(mark), "document": self.passage_text(mark)}
        for name, text in texts.items():
            if text.find(mark) != len(text) - 1:
                raise UserError(
                    f"the instruction of a {name} does not end with the text, {text.replace(mark, '{}')!r}: "
                    "a saved model can only carry what comes before it"
                )
        return {name: text[:-1] for name, text in texts.items()}


def _instruct(instruction_format: str, instruction: str | None, text: str, prompt: str) -> str:
    if instruction is None:
        return prompt + text
    # a shell hands over \n as two characters
    return instruction_format.replace("\\n", "\n").format(instruction, text) if instruction else text


def _check_format(instruction_format: str, name: str) -> None:
    try:
        text = instruction_format.format("\x01", "\x00")
    except (IndexError, KeyError, ValueError):
        text = ""
    if "\x00" not in text or "\x01" not in text:
        raise UserError(f"{name} {instruction_format!r}: expected two {{}}, for the instruction and for the text")
