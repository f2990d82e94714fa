"""Relevance judgments of TREC qrels and BEIR folders, joined with their queries.

TREC: lines of `query 0 document grade`, separated by white space. BEIR: a header, then query, document and grade,
separated by tabs; its folders have `corpus.jsonl` and `queries.jsonl` with `_id` and `text`, and the judgments in
`qrels/test.tsv`. Tabs, white space or commas (CSV) may separate the fields of both, and a header may name them in any
order.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa

from raybge.data.groups import Document, Group, parse_judged, row_id, text_key
from raybge.data.jsonl import Row, read_block
from raybge.data.survey import Survey
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

Grades = dict[str, dict[str, int]]  # by query, then by document
_GRADE = re.compile(r"(-?[0-9]{1,9})(\.0*)?")
# Names of columns in headers, in small letters without punctuation: of the query, the document and the grade.
_NAMES = (
    {"query", "queryid", "qid", "q", "topic", "topicid", "question", "questionid"},
    {"document", "documentid", "doc", "docid", "docno", "did", "d", "corpusid", "passage", "passageid", "pid"},
    {"score", "grade", "relevance", "relevancy", "rel", "label"},
)


MOST_NAMED = 100  # rows of repeated ids, of which each is located


@dataclass(frozen=True)
class JoinedQrels:
    """Result of joining queries with judgments.

    Args:
        queries: number of queries with a relevant document.
        unjudged: number of queries without one.
        unknown: judged queries that no row has.
        repeated: a message for each of the first MOST_NAMED rows whose id an earlier row has with another text.
        repeated_count: number of all such rows, which are left out.
    """

    queries: int
    unjudged: int
    unknown: tuple[str, ...]
    repeated: tuple[str, ...] = ()
    repeated_count: int = 0


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
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    header = _header(numbered[0][1]) if numbered else None
    for number, line in numbered[1 if header else 0 :]:
        judgment = _judgment(line, header)
        if judgment is None:
            raise UserError(
                f"{flag}: {path}:{number}: expected «query 0 document grade» (TREC) or «query document grade» (BEIR), "
                "separated by tabs, white space or commas, with a whole number as grade; a first line may name the "
                f"columns (query-id, corpus-id, score); found {line.strip()[:80]!r}"
            )
        query, document, grade = judgment
        grades = judged.setdefault(query, {})
        if grades.setdefault(document, grade) != grade:
            earlier = next(n for n, each in numbered if (_judgment(each, header) or ())[:2] == (query, document))
            raise UserError(
                f"{flag}: {path}:{number}: {query} {document} has the grade {grades[document]} in line {earlier}"
            )
    if not any(grade > 0 for grades in judged.values() for grade in grades.values()):
        raise UserError(f"{flag}: {path} names no relevant document")
    return judged


class _Columns(NamedTuple):
    """Positions of query, document and grade in a line, and its number of fields."""

    query: int
    document: int
    grade: int
    fields: int


_WITHOUT_HEADER = {3: _Columns(0, 1, 2, 3), 4: _Columns(0, 2, 3, 4)}


def _header(line: str) -> _Columns | None:
    """Return the columns that a header names; None if the line is not a header."""
    for fields in _splits(line):
        words = [re.sub(r"[\W_]", "", field).lower() for field in fields]
        matches = [[i for i, word in enumerate(words) if word in names] for names in _NAMES]
        if all(len(each) == 1 for each in matches):
            [query], [document], [grade] = matches
            return _Columns(query, document, grade, len(fields))
    return None


def _judgment(line: str, header: _Columns | None) -> tuple[str, str, int] | None:
    """Return (query, document, grade) of a line; None if it is invalid."""
    for fields in _splits(line):
        columns = header or _WITHOUT_HEADER.get(len(fields))
        if columns and columns.fields == len(fields):
            query, document, grade = (fields[at] for at in columns[:3])
            if query and document and (match := _GRADE.fullmatch(grade)):
                return query, document, int(match[1])
    return None


def _splits(line: str) -> Iterator[list[str]]:
    """Yield the fields of a line for each separator that it may have, tabs first."""
    if "\t" in line:
        yield _fields(line, "\t")
    words = line.split()
    if not any(word.endswith(",") for word in words):
        yield words
    if "," in line:
        yield _fields(line, ",")


def _fields(line: str, separator: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    except csv.Error:  # a field of more than 128 KiB
        return []


def join(queries: Survey, grades: Grades, path: str) -> JoinedQrels:
    """Write the queries that have a relevant document as rows of `parse_judged`, whose positives are documents' ids.

    One process reads and writes, row by row.

    Args:
        queries: the queries, surveyed with `parse_query`.
        grades: grades by query, then by document.
        path: path or URI of the new JSONL file.

    Returns:
        Numbers of queries, and what is left out.

    Raises:
        UserError: no query is judged.
    """
    first: dict[str, tuple[bytes, int, int]] = {}  # digest, block and line of each judged query
    repeated: list[str] = []
    repeated_count = unjudged = 0
    with open_atomic(path, "--storage_path") as out:
        for number in range(len(queries.blocks)):
            for row in read_block(queries.files, queries.blocks[number], parse_query):
                if not isinstance(row, Row):
                    continue
                query, judged = row.value, grades.get(row.value.id, {})
                if not _is_answered(judged):
                    unjudged += 1
                    continue
                prompt = {"prompt": row.raw["prompt"]} if row.raw.get("prompt") is not None else {}
                digest = text_key(json.dumps([query, prompt]))
                if earlier := first.get(query.id):
                    repeated_count += earlier[0] != digest
                    if earlier[0] != digest and len(repeated) < MOST_NAMED:
                        places = queries.place(number, row.line), queries.place(*earlier[1:])
                        repeated.append(f"{places[0]}: query {query.id} has another text in {places[1]}")
                    continue
                first[query.id] = digest, number, row.line
                fields = {"id": query.id, "query": query, "pos": [*judged], "grades": [*judged.values()]}
                out.write((json.dumps({**fields, **prompt}) + "\n").encode())
    if not first:
        raise UserError(f"--qrels judges none of the {unjudged:,} queries of --query_data: are their ids the same?")
    unknown = tuple(query for query, judged in grades.items() if _is_answered(judged) and query not in first)
    return JoinedQrels(len(first), unjudged, unknown, tuple(repeated), repeated_count)


def _is_answered(judged: Mapping[str, int]) -> bool:
    return any(grade > 0 for grade in judged.values())


def parse_answered(raw: dict[str, Any]) -> Group:
    """Parse a row of `join`; the query is a Document, since its answers are identified by ids too."""
    query = Document(raw["query"])
    query.id = raw["id"]
    return replace(parse_judged(raw), query=query)


def parse_query(raw: dict[str, Any]) -> Document:
    """Parse a query {"_id" or "id", "text" or "query"}; RowError if one is missing."""
    field = "query" if "query" in raw else "text"
    query = Document(parse_judged({"query": raw.get(field), "pos": "-", "prompt": raw.get("prompt")}).query)
    query.id = row_id(raw)
    return query
