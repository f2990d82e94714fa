"""Rows of training groups, passages, documents and judged queries: parsed and checked."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raybge.util.plural import plural

_QUOTED = 60  # characters of a wrong value that a message quotes
_MISSING = frozenset({"None", "nan", "NaN", "null", "NULL", "<NA>"})
_LONGEST_MISSING = 10  # characters, white space included
_LONGEST_LIST = 1 << 20  # characters: longer texts are not parsed
ID_FIELDS = ("_id", "id", "docid", "doc_id", "query_id")
# Of BEIR and Tevatron, of pyserini, of FlagEmbedding, of MS MARCO.
BODY_FIELDS = ("text", "contents", "content", "body")
_OTHER_BODY_FIELDS = frozenset(BODY_FIELDS[1:])
_NAN = re.compile(r"\bnan\b")
_LISTED = 20  # fields of a row that a message lists


class RowError(ValueError):
    """Error of a field; `expected` is what it must be and what it is, for example "must be a string, found 3"."""

    def __init__(self, field: str, expected: str):
        super().__init__(field, expected)  # both, for pickling
        self.field = field
        self.expected = expected


@dataclass(frozen=True)
class Group:
    """One query with its positives and negatives.

    Args:
        query: the query.
        pos: relevant passages.
        neg: negatives.
        prompt: the row's own instruction, None if it has none.
        pos_scores: teacher score of each positive; empty if not needed.
        neg_scores: teacher score of each negative; empty if not needed.
        grades: relevance grade of each of `pos`; empty if all are equally relevant.
    """

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    prompt: str | None
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()
    grades: tuple[int, ...] = ()


class Document(str):
    """Text of a passage that is identified by `id` instead of by its text: two documents may have the same text."""

    id: str


def parse_group(raw: dict[str, Any]) -> Group:
    """Parse a training row {"query", "pos", "neg"?, "prompt"?}; other fields are ignored.

    `pos` and `neg` are a string or a list of strings; `neg` may be missing, null or an empty list.

    Raises RowError if a field is invalid.
    """
    return Group(
        query=_text(raw, "query"),
        pos=_texts(raw, "pos"),
        neg=() if raw.get("neg") in (None, []) else _texts(raw, "neg", "(or be missing)"),
        prompt=_prompt(raw),
    )


def parse_scored_group(raw: dict[str, Any]) -> Group:
    """Parse a training row for distillation: {"pos_scores", "neg_scores"} in addition to the fields of `parse_group`.

    They have a finite number for each of `pos` and `neg`; without negatives `neg_scores` may be missing, null or empty.

    Raises RowError if a field is invalid.
    """
    group = parse_group(raw)
    return replace(
        group,
        pos_scores=_scores(raw, "pos", len(group.pos)),
        neg_scores=_scores(raw, "neg", len(group.neg)),
    )


def parse_example(raw: dict[str, Any]) -> tuple[str, str]:
    """Parse an example {"input", "output"} of a language model; RowError if one is not a non-empty string."""
    return _text(raw, "input"), _text(raw, "output")


def parse_passage(raw: dict[str, Any]) -> str:
    """Parse a passage, whose text is in one of BODY_FIELDS; RowError if it is not a non-empty string."""
    return _text(raw, _body_field(raw))


def parse_field(raw: dict[str, Any], field: str, also: Sequence[str] = ()) -> str:
    """Parse the text of one field; RowError if it is not a non-empty string, or if a field of `also` is missing."""
    for name in also:
        if name not in raw:
            raise RowError(name, f"is required, {_actual(raw, name)}")
    return _text(raw, field)


def parse_document(raw: dict[str, Any]) -> Document:
    """Parse a passage {"_id" or "id", "text", "title"?} in BEIR's format; the title precedes the text.

    The text is in one of BODY_FIELDS; after a title it may be empty. Raises RowError if the id or the text is missing.
    """
    title, field = raw.get("title"), _body_field(raw)
    if not (title is None or isinstance(title, str)):
        raise RowError("title", f"must be a string or null, {_actual(raw, 'title')}")
    if _is_text(title):
        document = Document(title if _is_blank(raw[field]) else f"{title} {_text(raw, field)}".strip())
    else:
        document = Document(_text(raw, field))
    document.id = row_id(raw)
    return document


def row_id(raw: dict[str, Any]) -> str:
    """Return the row's "_id" or "id", a string or a whole number; RowError if it has none."""
    field = next((name for name in ID_FIELDS if name in raw), "id")
    value = raw.get(field)
    if isinstance(value, bool) or not (isinstance(value, int) or _is_text(value)):
        raise RowError(field, f"must be a non-empty string or a whole number, {_actual(raw, field)}")
    return str(value)


def parse_judged(raw: dict[str, Any]) -> Group:
    """Parse an evaluation row {"query", "pos", "grades"?} or, as in FlagEmbedding, {"query", "positive"}.

    `grades` are whole numbers, one for each of `pos`; 1 or more means relevant. The group's `neg` is empty.

    Raises RowError if a field is invalid.
    """
    field = "positive" if "pos" not in raw and "positive" in raw else "pos"
    pos = _texts(raw, field)
    return Group(query=_text(raw, "query"), pos=pos, neg=(), prompt=_prompt(raw), grades=_grades(raw, len(pos)))


def check_texts(raw: dict[str, Any], value: object) -> None:
    """Raise RowError if a text of a parsed row names a missing value, or is a list that was written as a string.

    Other programs write these: str() of a column with missing values or lists.

    Args:
        raw: the row.
        value: result of parsing it: a Group, a Document or another text.
    """
    if isinstance(value, Group):
        fields: Iterable[tuple[str, Sequence[str]]] = (
            ("query", (value.query,)),
            ("pos", value.pos),
            ("neg", value.neg),
            ("prompt", (value.prompt,) if value.prompt else ()),
        )
    elif isinstance(value, Document):
        names = ["query"] if raw.get("query") == value else ["title", _body_field(raw)]
        fields = ((name, (raw[name],)) for name in names if _is_text(raw.get(name)))
    elif isinstance(value, str):
        fields = ((next((name for name, text in raw.items() if text == value), "text"), (value,)),)
    else:
        return
    for field, texts in fields:
        for text in texts:
            if len(text) < _LONGEST_MISSING and text.strip() in _MISSING:
                wrong = "a missing value written as text: write null, or leave it out"
            elif text[0] in "[( \t\r\n" and _is_list(text):
                wrong = "a list written as text: write a list of strings"
            else:
                continue
            raise RowError(field, f"must be text, found {_quote(text)}, {wrong} (--accept_any_text True: it is text)")


def _is_list(text: str) -> bool:
    """Return True if a text is the form in JSON or Python of a list with strings, missing values or lists."""
    text = text.strip()
    if text[0] not in "[(" or text[-1] not in "])" or len(text) > _LONGEST_LIST:
        return False
    values: object = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
    if values is None:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the text
            values = ast.literal_eval(_NAN.sub("None", text))
    if not isinstance(values, list | tuple):
        return False
    return not values or (
        all(isinstance(each, str | list | float | int | None) for each in values)
        and any(isinstance(each, str | list | None) for each in values)  # "[1]" cites, "(1985)" dates
    )


def id_key(document: str) -> bytes:
    """Return the `text_key` of a Document's id; a plain string is an id itself."""
    return text_key(document.id if isinstance(document, Document) else document)


def text_key(text: str) -> bytes:
    """Return 16 bytes that identify the text, equal on every machine and in every run."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def near_key(text: str) -> bytes:
    """Return a `text_key` that ignores case, white space and Unicode forms of a character."""
    return text_key(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def short_key(text: str) -> int:
    """Return the first 8 bytes of `text_key` as a signed number."""
    return int.from_bytes(text_key(text)[:8], "little", signed=True)


def _body_field(raw: dict[str, Any]) -> str:
    """Return the one of BODY_FIELDS that holds the row's text; RowError if there is none.

    "text" comes first. Of others one may contain the rest, such as "contents" of pyserini the title and the body;
    different texts are an error.
    """
    if _is_text(raw.get("text")) or ("text" in raw and _OTHER_BODY_FIELDS.isdisjoint(raw)):
        return "text"
    fields = [field for field in BODY_FIELDS if field in raw]
    if not fields:
        names = ", ".join(map(_quote, [*raw][:_LISTED])) + (", ..." if len(raw) > _LISTED else "")
        others = ", ".join(map(_quote, BODY_FIELDS[1:]))
        raise RowError("text", f"must be a non-empty string (or {others}), but the row has {names or 'no field'}")
    texts = {field: _text(raw, field) for field in fields if not _is_blank(raw[field])}
    whole = max(texts.values(), key=len, default="")
    if not all(text in whole for text in texts.values()):
        names = " and ".join(map(_quote, texts))
        raise RowError(fields[0], f"must be the only text of the row, but {names} differ: remove all but one")
    return next((field for field, text in texts.items() if text == whole), fields[0])


def _is_blank(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, str) and value.isspace())


def _text(raw: dict[str, Any], field: str) -> str:
    value = raw.get(field)
    if not _is_text(value):
        raise RowError(field, f"must be a non-empty string, {_actual(raw, field)}")
    assert isinstance(value, str)
    return value


def _texts(raw: dict[str, Any], field: str, or_else: str = "") -> tuple[str, ...]:
    value = raw.get(field)
    values = value if isinstance(value, list) else [value]
    wrong = next((index for index, text in enumerate(values) if not _is_text(text)), None)
    if values and wrong is None:
        return tuple(values)
    actual = _actual(raw, field)
    if isinstance(value, list) and wrong is not None:
        actual = f"found {_quote(values[wrong])} as item {wrong + 1} of {len(values)}"
    expected = " ".join(filter(None, ["must be a non-empty string or a list of them", or_else]))
    raise RowError(field, f"{expected}, {actual}")


def _scores(raw: dict[str, Any], of: str, count: int) -> tuple[float, ...]:
    field = f"{of}_scores"
    value = raw.get(field)
    if count == 0 and value in (None, []):
        return ()
    values: list[Any] = value if isinstance(value, list) else [value]
    wrong = next((index for index, score in enumerate(values) if not _is_score(score)), None)
    if len(values) == count and wrong is None:
        return tuple(float(score) for score in values)
    expected = f"must be a list of {plural(count, 'number')}, one for each of {of}"
    if not isinstance(value, list):
        raise RowError(field, f"{expected}, {_actual(raw, field)}")
    if wrong is not None:
        raise RowError(field, f"{expected}, found {_quote(value[wrong])} as item {wrong + 1} of {len(value)}")
    raise RowError(field, f"{expected}, found {len(value)}")


def _grades(raw: dict[str, Any], count: int) -> tuple[int, ...]:
    value = raw.get("grades")
    if value is None:
        return ()
    values: list[Any] = value if isinstance(value, list) else [value]
    if len(values) == count and all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        return tuple(values)
    number = plural(count, "whole number")
    raise RowError("grades", f"must be a list of {number}, one for each answer, {_actual(raw, 'grades')}")


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38 and math.isfinite(value)


def _prompt(raw: dict[str, Any]) -> str | None:
    value = raw.get("prompt")
    if value is not None and not isinstance(value, str):
        raise RowError("prompt", f"must be a string or null, {_actual(raw, 'prompt')}")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and not value.isspace()


def _actual(raw: dict[str, Any], field: str) -> str:
    return f"found {_quote(raw[field])}" if field in raw else "but the row has no such field"


def _quote(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _QUOTED else text[: _QUOTED - 3] + "..."
