"""Rows and judgments: accepted as by an independent reference, or refused with the field's name."""

import csv
import json
import math
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given
from inputs import share, tried

from raybge.data.groups import (
    RowError,
    parse_document,
    parse_example,
    parse_group,
    parse_judged,
    parse_passage,
    parse_scored_group,
    row_id,
)
from raybge.data.qrels import parse_query, read_qrels
from raybge.util.errors import UserError

FOLDER = tempfile.TemporaryDirectory(prefix="raybge-soak-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)

texts = st.one_of(st.text(max_size=4), st.sampled_from(["", " ", "\n", "\u2028", "\u200b", "a", "0", "é", "\0", "nan"]))
numbers = st.one_of(
    st.integers(-2, 3), st.floats(), st.sampled_from([1e38, 1e39, 10**400, -(10**400), True, False, 1.0])
)
anything = st.recursive(
    st.one_of(st.none(), texts, numbers),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
lists = st.one_of(st.lists(texts, max_size=4), st.lists(numbers, max_size=4), st.lists(anything, max_size=3))
FIELDS = "query pos neg prompt pos_scores neg_scores text contents content body title _id id grades".split()
FIELDS += "positive input output x".split()
rows = st.dictionaries(st.sampled_from(FIELDS), st.one_of(texts, lists, anything), max_size=8)


# --- the reference ----------------------------------------------------------------------------------------------------


class Refused(Exception):
    """Error with the name of the field."""


def need(good: bool, field: str) -> None:
    if not good:
        raise Refused(field)


def is_text(value: object) -> bool:
    return type(value) is str and len(value.strip()) > 0


def text(row: dict, field: str) -> str:
    need(is_text(row.get(field)), field)
    return row[field]


def many(row: dict, field: str) -> tuple:
    value = row.get(field)
    value = value if type(value) is list else [value]
    need(len(value) > 0 and all(map(is_text, value)), field)
    return tuple(value)


def prompt(row: dict) -> str | None:
    need(row.get("prompt") is None or type(row["prompt"]) is str, "prompt")
    return row.get("prompt")


def scores(row: dict, field: str, count: int) -> tuple:
    value = row.get(field)
    if count == 0 and (value is None or value == []):
        return ()
    value = value if type(value) is list else [value]
    need(len(value) == count, field)
    for each in value:
        need(type(each) in (int, float) and -1e38 < each < 1e38, field)
    return tuple(float(each) for each in value)


def group(row: dict) -> tuple:
    result = text(row, "query"), many(row, "pos")
    neg = () if row.get("neg") is None or row["neg"] == [] else many(row, "neg")
    return (*result, neg, prompt(row))


def scored(row: dict) -> tuple:
    query, pos, neg, own = group(row)
    return query, pos, neg, own, scores(row, "pos_scores", len(pos)), scores(row, "neg_scores", len(neg))


def judged(row: dict) -> tuple:
    field = "positive" if "pos" not in row and "positive" in row else "pos"
    pos = many(row, field)
    query, own = text(row, "query"), prompt(row)
    grades = row.get("grades")
    if grades is None:
        return query, pos, own, ()
    grades = grades if type(grades) is list else [grades]
    need(len(grades) == len(pos) and all(type(each) is int for each in grades), "grades")
    return query, pos, own, tuple(grades)


def identity(row: dict) -> str:
    field = "_id" if "_id" in row else "id"
    need(type(row.get(field)) is int or is_text(row.get(field)), field)
    return str(row[field])


def body(row: dict) -> str:
    """Return the row's text, "" if it is empty."""
    names = [name for name in ("text", "contents", "content", "body") if name in row]
    texts = {row[name]: name for name in names if row[name] is not None and text_or_blank(row, name)}
    need(len(names) > 0 and len(texts) < 2, "text" if not names else names[0])
    return next(iter(texts), "")


def text_or_blank(row: dict, name: str) -> bool:
    need(type(row[name]) is str, name)
    return row[name].strip() != ""


def passage(row: dict) -> str:
    result = body(row)
    need(result != "", next(name for name in ("text", "contents", "content", "body") if name in row))
    return result


def document(row: dict) -> tuple:
    result = body(row)
    need(row.get("title") is None or type(row["title"]) is str, "title")
    if is_text(row.get("title")):
        return (row["title"] + " " + result).strip() if result else row["title"], identity(row)
    return passage(row), identity(row)


def query(row: dict) -> tuple:
    return text(row, "query" if "query" in row else "text"), prompt(row) and None, identity(row)


CHECKS = {
    parse_group: (group, lambda g: (g.query, g.pos, g.neg, g.prompt)),
    parse_scored_group: (scored, lambda g: (g.query, g.pos, g.neg, g.prompt, g.pos_scores, g.neg_scores)),
    parse_judged: (judged, lambda g: (g.query, g.pos, g.prompt, g.grades)),
    parse_passage: (passage, lambda result: result),
    parse_document: (document, lambda result: (str(result), result.id)),
    parse_example: (lambda row: (text(row, "input"), text(row, "output")), lambda result: result),
    parse_query: (query, lambda result: (str(result), None, result.id)),
    row_id: (identity, lambda result: result),
}


@share(20)
@given(row=rows, parse=st.sampled_from([*CHECKS]))
def test_rows(row, parse):
    with tried("rows"):
        reference, shown = CHECKS[parse]
        try:
            expected = reference(row)
        except Refused as refused:
            expected = refused
        try:
            result = parse(row)
        except RowError as error:
            assert isinstance(expected, Refused), error
            assert error.field in {"query", "pos", "prompt", "title", str(expected)}
            # if several fields are invalid, any of them may be named; a row with only this error has to be refused too
            assert error.expected.startswith("must be")
        else:
            assert not isinstance(expected, Refused), expected
            assert shown(result) == expected


# --- judgments -------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.sampled_from(
        ["q1", "q2", "d1", "0", "1", "2", "-1", "score", "١", "²", "1_0", "+1", "", "1.0", "1.", "0.5", ".0", "a b"]
    ),
    texts,
)
spaces = st.sampled_from([" ", "\t", "  ", ",", ", "])
judgments = st.lists(st.builds(lambda mark, parts: mark.join(parts), spaces, st.lists(words, max_size=5)), max_size=5)


def reference_qrels(data: str) -> dict | None:
    """Return None if a line is invalid, two lines contradict each other, or nothing is relevant."""
    result: dict = {}
    for line in filter(str.strip, data.splitlines()):
        words = [] if any(word.endswith(",") for word in line.split()) else line.split()
        by_tab, by_comma = (
            [word.strip() for word in next(csv.reader([line], delimiter=mark, skipinitialspace=True))]
            if mark in line
            else []
            for mark in "\t,"
        )
        parts = next((parts for parts in (by_tab, words, by_comma) if is_judgment(parts)), None)
        if parts is None:
            return None
        grade = int(parts[-1].partition(".")[0])
        if result.setdefault((parts[0], parts[-2]), grade) != grade:
            return None
    return result if any(grade > 0 for grade in result.values()) else None


def is_judgment(parts: list[str]) -> bool:
    if len(parts) not in (3, 4) or not parts[0] or not parts[-2]:
        return False
    digits, _, zeros = parts[-1].removeprefix("-").partition(".")
    return 0 < len(digits) < 10 and set(digits) <= set("0123456789") and set(zeros) <= {"0"}


@share(5)
@given(lines=judgments, raw=st.binary(max_size=6), mixed=st.booleans())
def test_judgments(lines, raw, mixed):
    with tried("files of judgments"):
        data = "\n".join(lines).encode() + (raw if mixed else b"")
        path = Path(FOLDER.name) / "qrels.tsv"
        path.write_bytes(data)
        expected = reference_qrels(data.decode("utf-8-sig", "replace"))
        try:
            result = read_qrels(str(path), "--qrels")
        except UserError as error:
            assert expected is None, error
            assert "--qrels" in str(error) and str(path) in str(error)
        else:
            flat = {(query, document): grade for query, own in result.items() for document, grade in own.items()}
            assert flat == expected


def test_the_reference_accepts_and_refuses():
    row = {"query": "q", "pos": ["a"], "pos_scores": [1.0]}
    assert scored(row) == ("q", ("a",), (), None, (1.0,), ())
    for wrong in ({"pos_scores": [math.nan]}, {"pos_scores": [True]}, {"pos": []}, {"query": " "}):
        try:
            scored({**row, **wrong})
        except Refused as refused:
            assert str(refused) in wrong
        else:
            raise AssertionError(json.dumps(wrong))
