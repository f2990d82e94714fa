"""Relevance judgements in files of their own: TREC qrels and BEIR folders, joined with their queries.

TREC: `query 0 document grade` a line, divided by white space. BEIR: a header, then query, document and grade divided by
tabs; in its folders `corpus.jsonl` and `queries.jsonl` have an `_id` and a `text`, and `qrels/test.tsv` the judgements.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raybge.data.groups import Document, parse_judged, row_id
from raybge.data.jsonl import Row, read_block
from raybge.data.survey import Survey
from raybge.util import atomic_write as output
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

Grades = dict[str, dict[str, int]]  # by query, then by document
_GRADE = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class JoinedQrels:
    """What came of joining: queries written; those without a judgement, and judged ones that no row has."""

    queries: int
    unjudged: int
    unknown: tuple[str, ...]


def read_qrels(path: str, flag: str) -> Grades:
    """The judgements of a file (packed or not, a URI or not), by query and document. UserError with file and line for
    what is none.
    """
    found: Grades = {}
    try:
        system, place = filesystem(path)
        with system.open_input_stream(place) as stream:
            lines = stream.read().decode("utf-8-sig", "replace").splitlines()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{flag}: {path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        words = line.split("\t") if line.count("\t") == 2 else line.split()
        if not line.strip() or (number == 1 and words[-1:] == ["score"]):
            continue
        if len(words) not in (3, 4) or not _GRADE.fullmatch(words[-1].strip()):
            raise UserError(
                f"{flag}: {path}:{number}: expected «query 0 document grade» (TREC) or «query, document, grade» "
                f"divided by tabs (BEIR), found {line.strip()[:80]!r}"
            )
        query, document = words[0].strip(), words[-2].strip()
        grades = found.setdefault(query, {})
        if grades.setdefault(document, int(words[-1])) != int(words[-1]):
            raise UserError(f"{flag}: {path}:{number}: {query} {document} was graded {grades[document]} before")
    if not any(grade > 0 for grades in found.values() for grade in grades.values()):
        raise UserError(f"{flag}: {path} names no relevant document")
    return found


def join(found: Survey, grades: Grades, path: str) -> JoinedQrels:
    """Write the queries that have a relevant document, with their judgements, as rows that `parse_judged` reads: the
    answers are documents' ids.

    Args:
        found: the queries, surveyed with `parse_query`.
        path: of a new JSONL file, or its URI. One process reads and writes, row by row.

    UserError where no query is judged.
    """
    left, written, unjudged = dict(grades), 0, 0
    with output.open_atomic(path, "--storage_path") as out:
        for number in range(len(found.blocks)):
            for row in read_block(found.files, found.blocks[number], parse_query):
                if not isinstance(row, Row):
                    continue
                judged = left.pop(row.value.id, {})
                if not any(grade > 0 for grade in judged.values()):
                    unjudged += 1
                    continue
                fields = {"id": row.value.id, "query": row.value, "pos": [*judged], "grades": [*judged.values()]}
                prompt = {"prompt": row.raw["prompt"]} if row.raw.get("prompt") is not None else {}
                out.write((json.dumps({**fields, **prompt}) + "\n").encode())
                written += 1
    if not written:
        raise UserError(f"--qrels judges none of the {unjudged:,} queries of --query_data: are their ids the same?")
    unknown = [query for query, judged in left.items() if any(grade > 0 for grade in judged.values())]
    return JoinedQrels(written, unjudged, tuple(unknown))


def parse_query(raw: dict[str, Any]) -> Document:
    """Query row {"_id" or "id", "text" or "query"}. RowError where one is missing."""
    field = "query" if "query" in raw else "text"
    found = Document(parse_judged({"query": raw.get(field), "pos": "-", "prompt": raw.get("prompt")}).query)
    found.id = row_id(raw)
    return found
