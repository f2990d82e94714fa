"""Documents that have the id of an earlier document, but another text."""

from __future__ import annotations

from itertools import islice
from typing import Any

from raybge.cli.console import Console
from raybge.data.jsonl import Row, read_block
from raybge.search.deduplication import MAX_CONFLICTS, UniquePassages
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
    if not unique.conflict_count:
        return
    lines = []
    for group, number, *earlier in unique.conflicts[:MAX_CONFLICTS]:
        place, document = _find(passages, *unique.locate(group, number))
        lines.append(
            f"{place}: document {document.id} has another text in {_find(passages, *unique.locate(*earlier))[0]}"
        )
    if more := unique.conflict_count - len(lines):
        lines.append(f"and {more:,} more")
    if on_bad_rows == "stop":
        raise UserError("\n".join([*lines, "add --on_bad_rows skip to use the first document of each id"]))
    title = f"{flag}: {plural(unique.conflict_count, 'document')} skipped, whose id an earlier one has"
    console.info("\n".join([title, *lines]))


def _find(passages: Passages, block: int, number: int) -> tuple[str, Any]:
    """Return `file:line` and the document of a passage, which is counted from 0 in its block."""
    survey = passages.survey
    rows = (row for row in read_block(survey.files, survey.blocks[block], passages.parse) if isinstance(row, Row))
    documents = ((row.line, document) for row in rows for document in passages.texts(row.value))
    line, document = next(islice(documents, number, None))
    return survey.place(block, line), document
