"""Rows that have the id of an earlier row, but another text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from raybge.cli.console import Console
from raybge.data.jsonl import Row, read_block
from raybge.search.deduplication import MAX_CONFLICTS as LISTED
from raybge.search.deduplication import UniquePassages
from raybge.search.search_data import Passages
from raybge.util.errors import UserError
from raybge.util.plural import plural


def check_id_conflicts(
    passages: Passages, unique: UniquePassages, flag: str, on_bad_rows: str, console: Console
) -> None:
    """Report each document whose id an earlier one has with another text. Such a document is left out of `unique`.

    Args:
        passages: the documents.
        unique: the first document of each id.
        flag: flag of the files.
        on_bad_rows: "stop" or "skip".
        console: prints the documents that are skipped.

    Raises:
        UserError: there are such documents and `on_bad_rows` is "stop".
    """
    lines = []
    for group, number, *earlier in unique.conflicts[:LISTED]:
        (place, document), (first, _) = (_find(passages, *unique.locate(*each)) for each in ((group, number), earlier))
        lines.append(f"{place}: document {document.id} has another text in {first}")
    report_id_conflicts(lines, unique.conflict_count, flag, on_bad_rows, console)


def report_id_conflicts(lines: Sequence[str], count: int, flag: str, on_bad_rows: str, console: Console) -> None:
    """Report rows whose id an earlier row has with another text.

    Args:
        lines: a message for each row, or for the first LISTED rows.
        count: number of all such rows.
        flag: flag of the files.
        on_bad_rows: "stop" or "skip".
        console: prints the rows that are skipped.

    Raises:
        UserError: there are such rows and `on_bad_rows` is "stop".
    """
    if not count:
        return
    lines = [*lines[:LISTED], *([f"and {count - LISTED:,} more"] if count > LISTED else [])]
    if on_bad_rows == "stop":
        raise UserError("\n".join([*lines, f"{flag}: add --on_bad_rows skip to use the first row of each id"]))
    console.info("\n".join([f"{flag}: {plural(count, 'row')} skipped, whose id an earlier row has", *lines]))


def _find(passages: Passages, block: int, number: int) -> tuple[str, Any]:
    """Return `file:line` and the document of a passage, which is counted from 0 in its block."""
    survey = passages.survey
    rows = (row for row in read_block(survey.files, survey.blocks[block], passages.parse) if isinstance(row, Row))
    documents = ((row.line, document) for row in rows for document in passages.texts(row.value))
    line, document = next(islice(documents, number, None))
    return survey.place(block, line), document
