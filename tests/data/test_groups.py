"""Parsing of rows: accepted forms, and messages for invalid ones."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raybge.data.groups import (
    BODY_FIELDS,
    Group,
    RowError,
    check_texts,
    parse_document,
    parse_field,
    parse_group,
    parse_judged,
    parse_passage,
    parse_scored_group,
    short_key,
    text_key,
)
from raybge.data.jsonl import read_block, read_rows
from raybge.data.source_files import list_files, open_stream
from raybge.data.survey import survey
from raybge.util.errors import UserError


@pytest.mark.parametrize(
    ("raw", "group"),
    [
        ({"query": "q", "pos": "p"}, Group("q", ("p",), (), None)),
        ({"query": "q", "pos": ["p", "r"], "neg": "n"}, Group("q", ("p", "r"), ("n",), None)),
        ({"query": "q", "pos": ["p"], "neg": ["n", "n"]}, Group("q", ("p",), ("n", "n"), None)),
        ({"query": "q", "pos": ["p"], "neg": []}, Group("q", ("p",), (), None)),
        ({"query": "q", "pos": ["p"], "neg": None, "prompt": None}, Group("q", ("p",), (), None)),
        ({"query": " q ", "pos": ["p\n"], "prompt": "Find: "}, Group(" q ", ("p\n",), (), "Find: ")),
        ({"query": "q", "pos": ["p"], "id": 7, "pos_scores": [0.5]}, Group("q", ("p",), (), None)),
    ],
)
def test_group_forms(raw: dict, group: Group) -> None:
    assert parse_group(raw) == group


MISSING = ["None", "nan", " nan ", "NaN", "null", "NULL", "<NA>"]
LISTS = [
    "['a', None]",
    "[['a']]",
    "['a', nan]",
    "[None]",
    "['a', 'b']",
    '["a", "b"]',
    "[]",
    "()",
    "('a', 'b')",
    "['a' 'b']",
    " ['it\\'s'] ",
    '["a"]',
    "[\n 'a',\n]",
]
PLAIN = [
    "none",
    "Nan",
    "NaNs",
    "nothing",
    "[1]",
    "[1, 2]",
    "[a, b]",
    "[sic] a text",
    "(1985)",
    "a []",
    "[",
    "['a",
    "Na",
]


def checked(raw: dict, parse: Callable) -> Any:
    value = parse(raw)
    check_texts({**raw, "other": "None"}, value)
    return value


@pytest.mark.parametrize("text", [*MISSING, *LISTS])
def test_texts_that_other_programs_write_for_missing_values_and_lists(text: str) -> None:
    rows = [
        ("query", {"query": text, "pos": "p"}, parse_group),
        ("pos", {"query": "q", "pos": text}, parse_group),
        ("pos", {"query": "q", "pos": ["p", text]}, parse_group),
        ("neg", {"query": "q", "pos": "p", "neg": text}, parse_group),
        ("pos", {"query": "q", "pos": text}, parse_judged),
        ("text", {"text": text}, parse_passage),
        ("content", {"content": text}, parse_passage),
        ("text", {"_id": "1", "title": "a title", "text": text}, parse_document),
        ("title", {"_id": "1", "title": text, "text": "a text"}, parse_document),
        ("body", {"body": text}, lambda raw: parse_field(raw, "body")),
    ]
    for field, raw, parse in rows:
        with pytest.raises(RowError) as raised:
            checked(raw, parse)
        assert raised.value.field == field and "(--accept_any_text True: it is text)" in raised.value.expected
        assert ("a missing value written as text" in raised.value.expected) == (text in MISSING)


@pytest.mark.parametrize("text", PLAIN)
def test_texts_that_are_no_list_and_no_missing_value(text: str) -> None:
    group = checked({"query": text, "pos": [text], "neg": [text, "n"]}, parse_group)
    assert group == Group(text, (text,), (text, "n"), None)
    assert checked({"text": text}, parse_passage) == text
    assert checked({"id": "None", "text": text, "title": None}, parse_document) == text


def test_long_or_deep_brackets_are_text() -> None:
    for text in ("[" * 100_000 + "]" * 100_000, "['" + "a" * (1 << 20) + "']", "[" + "-" * 10_000 + "1]"):
        assert checked({"text": text}, parse_passage) == text


def test_any_text_is_accepted_on_request(tmp_path: Path) -> None:
    """In every way of reading: survey, blocks, single rows."""
    raw = {"query": "None", "pos": ["[]"], "neg": ["nan"]}
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(raw) + "\n") * 3)
    with pytest.raises(UserError, match='a.jsonl:1: "query" must be text, found "None", a missing value'):
        survey(list_files(path, "--f"), 1 << 20, parse_group)
    files = list_files(path, "--f", any_text=True)
    counts = survey(files, 1 << 20, parse_group)
    assert counts.total_rows == 3
    assert [row.raw for row in read_block(files, counts.blocks[0], parse_group)] == [raw] * 3
    for all_good in (True, False):
        with open_stream(files[0]) as stream:
            rows = read_rows(stream, counts.blocks[0], parse_group, [1], all_good, any_text=True)
        assert rows[1].raw == raw


TEXT = "must be a non-empty string"
TEXTS = "must be a non-empty string or a list of them"


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        ({"pos": "p"}, "query", f"{TEXT}, but the row has no such field"),
        ({"query": None, "pos": "p"}, "query", f"{TEXT}, found null"),
        ({"query": "", "pos": "p"}, "query", f'{TEXT}, found ""'),
        ({"query": " \t", "pos": "p"}, "query", f'{TEXT}, found " \\t"'),
        ({"query": ["q"], "pos": "p"}, "query", f'{TEXT}, found ["q"]'),
        ({"query": "q"}, "pos", f"{TEXTS}, but the row has no such field"),
        ({"query": "q", "pos": 3}, "pos", f"{TEXTS}, found 3"),
        ({"query": "q", "pos": None}, "pos", f"{TEXTS}, found null"),
        ({"query": "q", "pos": []}, "pos", f"{TEXTS}, found []"),
        ({"query": "q", "pos": {"p": 1}}, "pos", f'{TEXTS}, found {{"p": 1}}'),
        ({"query": "q", "pos": ["p", ""]}, "pos", f'{TEXTS}, found "" as item 2 of 2'),
        ({"query": "q", "pos": ["p", ["r"]]}, "pos", f'{TEXTS}, found ["r"] as item 2 of 2'),
        ({"query": "q", "pos": "p", "neg": 0}, "neg", f"{TEXTS} (or be missing), found 0"),
        ({"query": "q", "pos": "p", "neg": False}, "neg", f"{TEXTS} (or be missing), found false"),
        ({"query": "q", "pos": "p", "neg": ""}, "neg", f'{TEXTS} (or be missing), found ""'),
        ({"query": "q", "pos": "p", "neg": [1]}, "neg", f"{TEXTS} (or be missing), found 1 as item 1 of 1"),
        ({"query": "q", "pos": "p", "prompt": 1}, "prompt", "must be a string or null, found 1"),
    ],
)
def test_group_errors(raw: dict, field: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_group(raw)
    assert (caught.value.field, caught.value.expected) == (field, expected)


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(RowError) as caught:
        parse_group({"query": ["x" * 1000], "pos": "p"})
    assert caught.value.expected == f'{TEXT}, found ["{"x" * 55}...'


SEVEN = {"query": "q", "pos": ["p", "r"], "neg": list("abcdefg"), "pos_scores": [1, 0.5]}


@pytest.mark.parametrize(
    ("raw", "pos_scores", "neg_scores"),
    [
        ({**SEVEN, "neg_scores": [7, 6, 5, 4, 3, 2, -1.5]}, (1.0, 0.5), (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, -1.5)),
        ({"query": "q", "pos": "p", "pos_scores": [2]}, (2.0,), ()),
        ({"query": "q", "pos": "p", "pos_scores": 2, "neg": "n", "neg_scores": 3}, (2.0,), (3.0,)),
        ({"query": "q", "pos": "p", "neg": [], "pos_scores": [2], "neg_scores": None}, (2.0,), ()),
    ],
)
def test_scored_groups(raw: dict, pos_scores: tuple, neg_scores: tuple) -> None:
    group = parse_scored_group(raw)
    assert (group.pos_scores, group.neg_scores) == (pos_scores, neg_scores)
    assert (group.query, group.pos, group.neg) == (parse_group(raw).query, parse_group(raw).pos, parse_group(raw).neg)
    assert parse_group(raw).pos_scores == ()


NUMBERS = "must be a list of 7 numbers, one for each of neg"


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        ({}, "query", f"{TEXT}, but the row has no such field"),
        (SEVEN, "neg_scores", f"{NUMBERS}, but the row has no such field"),
        ({**SEVEN, "neg_scores": None}, "neg_scores", f"{NUMBERS}, found null"),
        ({**SEVEN, "neg_scores": [1, 2, 3, 4, 5]}, "neg_scores", f"{NUMBERS}, found 5"),
        ({**SEVEN, "neg_scores": [1, 2, "3", 4, 5, 6, 7]}, "neg_scores", f'{NUMBERS}, found "3" as item 3 of 7'),
        ({**SEVEN, "neg_scores": [1, 2, True, 4, 5, 6, 7]}, "neg_scores", f"{NUMBERS}, found true as item 3 of 7"),
        ({**SEVEN, "neg_scores": [1, 2, 3, 4, 5, 6, 1e999]}, "neg_scores", f"{NUMBERS}, found Infinity as item 7 of 7"),
        ({**SEVEN, "neg_scores": [1, 2, 3, 4, 5, 6, 1e39]}, "neg_scores", f"{NUMBERS}, found 1e+39 as item 7 of 7"),
        (
            {"query": "q", "pos": "p"},
            "pos_scores",
            "must be a list of 1 number, one for each of pos, but the row has no such field",
        ),
        (
            {"query": "q", "pos": "p", "pos_scores": 1, "neg_scores": [1]},
            "neg_scores",
            "must be a list of 0 numbers, one for each of neg, found 1",
        ),
    ],
)
def test_scored_group_errors(raw: dict, field: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_scored_group(raw)
    assert (caught.value.field, caught.value.expected) == (field, expected)


@pytest.mark.parametrize(
    "raw",
    [
        {"text": "t"},
        {"contents": "t", "id": 1},  # pyserini
        {"content": "t", "id": 1},  # FlagEmbedding
        {"docid": "1", "body": "t"},  # MS MARCO
        {"text": "t", "contents": "t"},
        {"text": "", "contents": None, "body": "t"},  # columns of a table with rows of several sources
        {"content": "t", "text": " "},
        {"text": "t", "content": None, "more": ["x"]},
    ],
)
def test_passages(raw: dict) -> None:
    assert parse_passage(raw) == "t"
    document = parse_document({"_id": "d", **raw, "title": ""})
    assert document == "t" and document.id == "d"
    assert parse_document({"_id": "d", **raw, "title": "T"}) == "T t"


@pytest.mark.parametrize(
    "raw",
    [
        {"text": "t", "content": ["x", "y"]},
        {"text": "t", "content": {"a": 1}, "body": 3},
        {"text": "t", "contents": "T\nt"},
        {"text": "", "contents": "t"},
        {"body": "t", "contents": "t"},
    ],
)
def test_text_comes_before_the_other_names(raw: dict) -> None:
    assert parse_passage(raw) == "t" and parse_document({"_id": "d", **raw}) == "t"


def test_of_other_names_the_one_that_contains_the_rest_is_taken() -> None:
    """Anserini writes "contents" from the title and the body, and keeps both."""
    assert parse_passage({"contents": "T\nt", "body": "t"}) == "T\nt"


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        ({}, "text", 'must be a non-empty string (or "contents", "content", "body"), but the row has '),
        ({"passage": "t", "Text": "t"}, "text", 'but the row has "passage", "Text"'),
        ({"text": 1, "content": "c"}, "text", "must be a non-empty string, found 1"),
        ({"body": ["c", "d"]}, "body", 'must be a non-empty string, found ["c", "d"]'),
        ({"text": ["t"]}, "text", 'must be a non-empty string, found ["t"]'),
        ({"contents": {"t": 1}}, "contents", 'must be a non-empty string, found {"t": 1}'),
        ({"contents": "t", "text": None, "body": "u"}, "text", 'but "contents" and "body" differ'),
    ],
)
def test_a_body_under_no_name_or_under_two(raw: dict, field: str, expected: str) -> None:
    """A title does not make it a document."""
    rows = [(parse_passage, raw)]
    rows += [(parse_document, {**raw, "_id": "d", **title}) for title in ({}, {"title": "T"}, {"title": None})]
    for parse, row in rows:
        with pytest.raises(RowError) as caught:
            parse(row)
        assert caught.value.field == field and expected in caught.value.expected


@pytest.mark.parametrize("field", BODY_FIELDS)
@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_body(field: str, empty: str | None) -> None:
    assert parse_document({"_id": "d", "title": "T", field: empty}) == "T"
    for parse in (parse_passage, parse_document):
        with pytest.raises(RowError, match="must be a non-empty string, found") as caught:
            parse({"_id": "d", field: empty})
        assert caught.value.field == field


@pytest.mark.parametrize("title", [["T"], 1984, {"de": "T"}, False])
def test_a_title_is_a_string(title: object) -> None:
    with pytest.raises(RowError, match="must be a string or null, found") as caught:
        parse_document({"_id": "d", "title": title, "text": "t"})
    assert caught.value.field == "title"


def test_judged_queries() -> None:
    group = Group("q", ("p", "r"), (), None)
    assert parse_judged({"query": "q", "pos": ["p", "r"]}) == group
    assert parse_judged({"query": "q", "positive": ["p", "r"], "neg": 3}) == group
    assert parse_judged({"query": "q", "pos": "p", "positive": "x", "prompt": "F"}) == Group("q", ("p",), (), "F")
    with pytest.raises(RowError) as caught:
        parse_judged({"query": "q", "positive": []})
    assert caught.value.field == "positive"
    with pytest.raises(RowError) as caught:
        parse_judged({"query": "q"})
    assert caught.value.field == "pos"


def test_text_key() -> None:
    assert text_key("żó") == hashlib.blake2b(b"\xc5\xbc\xc3\xb3", digest_size=16).digest()
    assert short_key("żó") == int.from_bytes(text_key("żó")[:8], "little", signed=True)
    assert len({text_key(text) for text in ("a", "a ", "A", "\u00e1", "a\u0301")}) == 5
