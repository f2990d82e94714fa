"""Fields of rows: the text that is encoded, and the fields that are written next to its vector."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raybge.data.groups import parse_field

ID_FIELDS = ("id", "_id")  # written by default if the rows have them


@dataclass(frozen=True)
class RowParser:
    """Parser of a row: requires the text, and the fields that were requested by name.

    Args:
        text: field of the text.
        requested: fields to write, in order; None: the ids that exist, then the text.
    """

    text: str
    requested: tuple[str, ...] | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields to write, in order; default ids may be missing in the rows."""
        if self.requested is None:
            return (*(name for name in ID_FIELDS if name != self.text), self.text)
        return self.requested

    def __call__(self, raw: dict[str, Any]) -> str:
        """Return the text of a row."""
        return parse_field(raw, self.text, self.requested or ())


def value_kind(value: Any) -> str:
    """Return the kind of a JSON value: "bool", "int", "float", "text", "null" or "json"."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    return {str: "text", float: "float", type(None): "null"}.get(type(value), "json")


def column_type(kinds: Iterable[str]) -> pa.DataType | None:
    """Return the Arrow type of a column of these kinds: string if they differ; None if all values are null."""
    distinct = {*kinds} - {"null"}
    if not distinct:
        return None
    if distinct <= {"int", "float"}:
        return pa.float64() if "float" in distinct else pa.int64()
    return pa.bool_() if distinct == {"bool"} else pa.string()


def field_columns(rows: list[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Array]:
    """Yield the fields of rows as columns of the schema; in a string column, other values are written as JSON."""
    for column in schema:
        values = [row.get(column.name) for row in rows]
        if column.type == pa.string():
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        yield pa.array(values, column.type)
