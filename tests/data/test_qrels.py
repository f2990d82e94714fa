"""Judgments in TREC and BEIR format, joined with their queries."""

import gzip
import json

import pytest

from raybge.data.groups import RowError, id_key, parse_document, parse_judged, text_key
from raybge.data.qrels import JoinedQrels, join, parse_query, read_qrels
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.util.errors import UserError

WANTED = {"q1": {"d1": 1, "d2": 0}, "q2": {"d 3": 2}}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td 3\t2\n", WANTED),
        ("a.tsv", "q1\td1\t1\r\nq1\td2\t0\r\n\r\nq2\td 3\t2", WANTED),  # without a header
        ("a.txt", "q1 0 d1 1\nq1 0 d2 0\nq2  Q0   d3 2\n", {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": 2}}),
        ("a.txt", "7\t0\t9\t1\n7\t0\t9\t1\n8\t0\t9\t-1\n", {"7": {"9": 1}, "8": {"9": -1}}),
    ],
)
def test_both_formats_are_read(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    assert read_qrels(str(tmp_path / name), "--qrels") == wanted
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_qrels(str(tmp_path / f"{name}.gz"), "--qrels") == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q1 0 d1 1\nq1 d2\n", ":2: expected"),
        ("q1\td1\tvery\n", ":1: expected"),
        ("q1 0 d1 ²\n", ":1: expected"),
        ("q1 0 d1 " + "9" * 5000, ":1: expected"),
        ("q1 0 d1 1\nq1 0 d1 2\n", ":2: q1 d1 has the grade 1 in an earlier line"),
        ("q1 0 d1 0\n", "names no relevant document"),
        ("", "names no relevant document"),
    ],
)
def test_an_invalid_judgment_is_named(tmp_path, text, says):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--qrels: .*{says}"):
        read_qrels(str(path), "--qrels")
    with pytest.raises(UserError, match="--qrels: .*cannot be read"):
        read_qrels(str(tmp_path / "gone"), "--qrels")


def test_queries_are_joined_with_their_judgments(tmp_path):
    rows = [
        {"_id": "q1", "text": "one", "prompt": "p: "},
        {"_id": "q3", "text": "not judged"},
        {"_id": "q2", "query": "two", "text": "other"},
        {"_id": "q4", "text": "nothing relevant"},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = survey(list_files(str(path), "--query_data"), 60, parse_query)
    assert len(queries.blocks) > 1
    grades = {**WANTED, "q4": {"d1": 0}, "q5": {"d1": 1}, "q6": {"d1": 0}}
    out = tmp_path / "new" / "judged.jsonl"
    assert join(queries, grades, str(out)) == JoinedQrels(2, 2, ("q5",))
    groups = [parse_judged(json.loads(line)) for line in out.read_text().splitlines()]
    assert [(g.query, g.pos, g.grades, g.prompt) for g in groups] == [
        ("one", ("d1", "d2"), (1, 0), "p: "),
        ("two", ("d 3",), (2,), None),
    ]
    with pytest.raises(UserError, match="judges none of the 4 queries"):
        join(queries, {"q9": {"d1": 1}}, str(out))


def test_documents_are_identified_by_their_id():
    first = parse_document({"_id": "d1", "title": "Lanes", "text": "are long."})
    assert first == "Lanes are long." and first.id == "d1"
    assert parse_document({"id": 7, "title": "", "text": "t"}).id == "7"
    assert parse_document({"_id": "d", "title": "Alone", "text": ""}) == "Alone"
    same = parse_document({"_id": "d2", "title": "Lanes", "text": "are long."})
    assert first == same and id_key(first) != id_key(same) and id_key(first) == id_key("d1") == text_key("d1")
    for wrong, field in (
        ({"text": "t"}, "id"),
        ({"_id": True, "text": "t"}, "_id"),
        ({"_id": "x", "text": ""}, "text"),
    ):
        with pytest.raises(RowError) as error:
            parse_document(wrong)
        assert error.value.field == field


@pytest.mark.parametrize("grades", [[1], [1, 2, 3], [1, 0.5], [1, True], "1"])
def test_the_number_of_grades_is_checked(grades):
    assert parse_judged({"query": "q", "pos": ["a", "b"], "grades": [2, 0]}).grades == (2, 0)
    assert parse_judged({"query": "q", "pos": ["a", "b"]}).grades == ()
    with pytest.raises(RowError, match="2 whole numbers, one for each answer"):
        parse_judged({"query": "q", "pos": ["a", "b"], "grades": grades})
