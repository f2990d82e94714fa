"""Relevance judgments of TREC qrels and BEIR folders, joined with their queries.

TREC: lines of `query 0 document grade`, separated by white space. BEIR: a header, then query, document and grade,
separated by tabs; its folders have `corpus.jsonl` and `queries.jsonl` with `_id` and `text`, and the judgments in
`qrels/test.tsv`.
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
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

Grades = dict[str, dict[str, int]]  # by query, then by document
_GRADE = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class JoinedQrels:
    """Result of joining queries with judgments.

    Args:
        queries: number of queries with a relevant document.
        unjudged: number of queries without one.
        unknown: judged queries that no row has.
    """

    queries: int
    unjudged: int
    unknown: tuple[str, ...]


def read_qrels(path: str, flag: str) -> Grades:
    """Read the judgments of a file, which may be compressed or at a URI.

    Args:
        path: path or URI.
        flag: flag that an error message names.

    Returns:
        Grades by query, then by document.

    Raises:
        UserError: naming file and line of an invalid judgment.
    """
    judged: Grades = {}
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
                f"separated by tabs (BEIR), found {line.strip()[:80]!r}"
            )
        query, document = words[0].strip(), words[-2].strip()
        grades = judged.setdefault(query, {})
        if grades.setdefault(document, int(words[-1])) != int(words[-1]):
            raise UserError(
                f"{flag}: {path}:{number}: {query} {document} has the grade {grades[document]} in an earlier line"
            )
    if not any(grade > 0 for grades in judged.values() for grade in grades.values()):
        raise UserError(f"{flag}: {path} names no relevant document")
    return judged


def join(queries: Survey, grades: Grades, path: str) -> JoinedQrels:
    """Write the queries that have a relevant document as rows of `parse_judged`, whose positives are documents' ids.

    One process reads and writes, row by row.

    Args:
        queries: the queries, surveyed with `parse_query`.
        grades: grades by query, then by document.
        path: path or URI of the new JSONL file.

    Returns:
        Numbers of queries.

    Raises:
        UserError: no query is judged.
    """
    remaining, written, unjudged = dict(grades), 0, 0
    with open_atomic(path, "--storage_path") as out:
        for number in range(len(queries.blocks)):
            for row in read_block(queries.files, queries.blocks[number], parse_query):
                if not isinstance(row, Row):
                    continue
                judged = remaining.pop(row.value.id, {})
                if not any(grade > 0 for grade in judged.values()):
                    unjudged += 1
                    continue
                fields = {"id": row.value.id, "query": row.value, "pos": [*judged], "grades": [*judged.values()]}
                prompt = {"prompt": row.raw["prompt"]} if row.raw.get("prompt") is not None else {}
                out.write((json.dumps({**fields, **prompt}) + "\n").encode())
                written += 1
    if not written:
        raise UserError(f"--qrels judges none of the {unjudged:,} queries of --query_data: are their ids the same?")
    unknown = [query for query, judged in remaining.items() if any(grade > 0 for grade in judged.values())]
    return JoinedQrels(written, unjudged, tuple(unknown))


def parse_query(raw: dict[str, Any]) -> Document:
    """Parse a query {"_id" or "id", "text" or "query"}; RowError if one is missing."""
    field = "query" if "query" in raw else "text"
    query = Document(parse_judged({"query": raw.get(field), "pos": "-", "prompt": raw.get("prompt")}).query)
    query.id = row_id(raw)
    return query
