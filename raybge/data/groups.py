"""What a row must look like: training groups, passages, judged queries. Pure Python, the standard library
only.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_SHOWN = 60  # characters of a wrong value that a message quotes


class RowError(ValueError):
    """Raised by parse functions: `expected` says what the field must be and what was found, e.g. "must be a
    string, found 3".
    """

    def __init__(self, field: str, expected: str):
        super().__init__(field, expected)  # both, so that the error survives pickling
        self.field = field
        self.expected = expected


@dataclass(frozen=True)
class Group:
    """One query with its positives and negatives; `prompt` is the row's own instruction, None where it has
    none. `pos_scores` and `neg_scores` are a teacher's, one for each of `pos` and `neg`, where they were asked for;
    `grades` say how relevant each of `pos` is, and are empty where all are alike.
    """

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    prompt: str | None
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()
    grades: tuple[int, ...] = ()


class Document(str):
    """A passage that goes by its `id`: other than those that go by their text, two may have the same."""

    id: str


def parse_group(raw: dict[str, Any]) -> Group:
    """Training row {"query", "pos", "neg"?, "prompt"?}; other fields are not looked at. RowError where a
    field is wrong.

    `pos` and `neg` are a string or a list of strings; `neg` may be missing, null or an empty list.
    """
    return Group(
        query=_text(raw, "query"),
        pos=_texts(raw, "pos"),
        neg=() if raw.get("neg") in (None, []) else _texts(raw, "neg", "(or be left out)"),
        prompt=_prompt(raw),
    )


def parse_scored_group(raw: dict[str, Any]) -> Group:
    """As parse_group, for distillation: a row must have {"pos_scores", "neg_scores"} too, a finite number for each of
    `pos` and `neg`; without negatives `neg_scores` may be missing, null or an empty list.
    """
    group = parse_group(raw)
    return replace(
        group,
        pos_scores=_scores(raw, "pos", len(group.pos)),
        neg_scores=_scores(raw, "neg", len(group.neg)),
    )


def parse_example(raw: dict[str, Any]) -> tuple[str, str]:
    """A language model's example {"input", "output"}. RowError where one is no non-empty string."""
    return _text(raw, "input"), _text(raw, "output")


def parse_passage(raw: dict[str, Any]) -> str:
    """Passage row {"text"}, or the recipe's {"content"}. RowError where neither is a non-empty string."""
    return _text(raw, "content" if "text" not in raw and "content" in raw else "text")


def parse_field(raw: dict[str, Any], field: str, also: Sequence[str] = ()) -> str:
    """The text in a field of a row that must have the fields `also` too. RowError where it is no non-empty string."""
    for name in also:
        if name not in raw:
            raise RowError(name, f"must be there, {_found(raw, name)}")
    return _text(raw, field)


def parse_document(raw: dict[str, Any]) -> Document:
    """Passage row {"_id" or "id", "text", "title"?}, as BEIR has it; the title goes before the text. RowError where
    there is no id or nothing to read.
    """
    title = raw.get("title")
    if _is_text(title):
        body = raw.get("text")
        found = Document(f"{title} {body}".strip() if isinstance(body, str) else title)
    else:
        found = Document(parse_passage(raw))
    found.id = row_id(raw)
    return found


def row_id(raw: dict[str, Any]) -> str:
    """What the row goes by: its "_id" or "id", a string or a whole number."""
    field = "_id" if "_id" in raw else "id"
    value = raw.get(field)
    if isinstance(value, bool) or not (isinstance(value, int) or _is_text(value)):
        raise RowError(field, f"must be a non-empty string or a whole number, {_found(raw, field)}")
    return str(value)


def parse_judged(raw: dict[str, Any]) -> Group:
    """Evaluation row {"query", "pos", "grades"?}, or the recipe's {"query", "positive"}; the group's `neg` is empty.
    RowError as above.

    `grades` are whole numbers, one for each of `pos`; those of 1 or more are relevant.
    """
    field = "positive" if "pos" not in raw and "positive" in raw else "pos"
    pos = _texts(raw, field)
    return Group(query=_text(raw, "query"), pos=pos, neg=(), prompt=_prompt(raw), grades=_grades(raw, len(pos)))


def id_key(document: str) -> bytes:
    """As `text_key`, of what a Document goes by; a plain string is an id itself."""
    return text_key(document.id if isinstance(document, Document) else document)


def text_key(text: str) -> bytes:
    """16 bytes that stand for the text: equal texts, equal keys, on every machine and in every run."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def near_key(text: str) -> bytes:
    """As `text_key`, equal also where texts differ in nothing but case, white space or the form of a character."""
    return text_key(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def short_key(text: str) -> int:
    """The first 8 bytes of `text_key` as a signed number."""
    return int.from_bytes(text_key(text)[:8], "little", signed=True)


def _text(raw: dict[str, Any], field: str) -> str:
    value = raw.get(field)
    if not _is_text(value):
        raise RowError(field, f"must be a non-empty string, {_found(raw, field)}")
    assert isinstance(value, str)
    return value


def _texts(raw: dict[str, Any], field: str, or_else: str = "") -> tuple[str, ...]:
    value = raw.get(field)
    values = value if isinstance(value, list) else [value]
    wrong = next((index for index, text in enumerate(values) if not _is_text(text)), None)
    if values and wrong is None:
        return tuple(values)
    found = _found(raw, field)
    if isinstance(value, list) and wrong is not None:
        found = f"found {_shown(values[wrong])} as item {wrong + 1} of {len(values)}"
    asked = " ".join(filter(None, ["must be a non-empty string or a list of them", or_else]))
    raise RowError(field, f"{asked}, {found}")


def _scores(raw: dict[str, Any], of: str, count: int) -> tuple[float, ...]:
    field = f"{of}_scores"
    value = raw.get(field)
    if count == 0 and value in (None, []):
        return ()
    values: list[Any] = value if isinstance(value, list) else [value]
    wrong = next((index for index, score in enumerate(values) if not _is_score(score)), None)
    if len(values) == count and wrong is None:
        return tuple(float(score) for score in values)
    asked = f"must be a list of {count} number{'s' * (count != 1)}, one for each of {of}"
    if not isinstance(value, list):
        raise RowError(field, f"{asked}, {_found(raw, field)}")
    if wrong is not None:
        raise RowError(field, f"{asked}, found {_shown(value[wrong])} as item {wrong + 1} of {len(value)}")
    raise RowError(field, f"{asked}, found {len(value)}")


def _grades(raw: dict[str, Any], count: int) -> tuple[int, ...]:
    value = raw.get("grades")
    if value is None:
        return ()
    values: list[Any] = value if isinstance(value, list) else [value]
    if len(values) == count and all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        return tuple(values)
    number = f"{count} whole number{'s' * (count != 1)}"
    raise RowError("grades", f"must be a list of {number}, one for each answer, {_found(raw, 'grades')}")


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38 and math.isfinite(value)


def _prompt(raw: dict[str, Any]) -> str | None:
    value = raw.get("prompt")
    if value is not None and not isinstance(value, str):
        raise RowError("prompt", f"must be a string or null, {_found(raw, 'prompt')}")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and not value.isspace()


def _found(raw: dict[str, Any], field: str) -> str:
    return f"found {_shown(raw[field])}" if field in raw else "but the row has no such field"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
