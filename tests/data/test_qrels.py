"""Judgments in TREC and BEIR format, joined with their queries."""

import gzip
import json

import pytest
import pytrec_eval

from raybge.data.groups import RowError, id_key, parse_document, parse_judged, text_key
from raybge.data.qrels import JoinedQrels, join, parse_answered, parse_query, read_qrels
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.util.errors import UserError

WANTED = {"q1": {"d1": 1, "d2": 0}, "q2": {"d 3": 2}}
D3 = {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": 2}}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td 3\t2\n", WANTED),
        ("a.tsv", "q1\td1\t1\r\nq1\td2\t0\r\n\r\nq2\td 3\t2", WANTED),  # without a header
        ("a.txt", "q1 0 d1 1\nq1 0 d2 0\nq2  Q0   d3 2\n", D3),
        ("a.txt", "7\t0\t9\t1\n7\t0\t9\t1\n8\t0\t9\t-1\n", {"7": {"9": 1}, "8": {"9": -1}}),
        # other headers
        ("a.tsv", "qid\tdocid\trelevance\nq1\td1\t1\nq1\td2\t0\nq2\td 3\t2\n", WANTED),
        ("a.tsv", "\nquery_id\tQ0\tdoc_id\trel\nq1\t0\td1\t1\nq1\t0\td2\t0\nq2\t0\td 3\t2\n", WANTED),
        ("a.tsv", "\ufeffScore\tCorpus-ID\tQuery-ID\n1\td1\tq1\n0\td2\tq1\n2\td 3\tq2\n", WANTED),  # another order
        ("a.txt", "query-id corpus-id score\nq1 d1 1\nq1 d2 0\nq2 d3 2\n", D3),
        ("a.tsv", "query-id corpus-id score\nq1\td1\t1\nq1\td2\t0\nq2\td 3\t2\n", WANTED),
        ("a.csv", "query-id,corpus-id,score\nq1,d1,1\nq1,d2,0\nq2,d 3,2\n", WANTED),
        ("a.csv", 'topic,"document",label\n"q1",d1,1\nq1,"d2",0\nq2,"d 3", 2\n', WANTED),
        ("a.csv", ",query-id,corpus-id,score\n0,q1,d1,1\n1,q1,d2,0\n2,q2,d 3,2\n", WANTED),  # with pandas' index
        ("a.csv", "q1,d1,1\nq1,d2,0\nq2,d 3,2\n", WANTED),
        ("a.csv", "q1, d1, 1\nq1, d2, 0\nq2, d 3, 2\n", WANTED),
        ("a.csv", 'q1, "d1", 1\n"q1", "d2", "0"\nq2, "d 3", 2\n', WANTED),
        # other grades and ids
        ("a.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1.0\nq1\td2\t0.\nq2\td 3\t2.00\n", WANTED),
        ("a.txt", "q1 0 d1 -1.0\nq1 0 d,2 1\nq,2 0 d3 1", {"q1": {"d1": -1, "d,2": 1}, "q,2": {"d3": 1}}),
    ],
)
def test_all_formats_are_read(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    assert read_qrels(str(tmp_path / name), "--qrels") == wanted
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_qrels(str(tmp_path / f"{name}.gz"), "--qrels") == wanted


def test_trec_eval_reads_the_same_grades(tmp_path):
    """Negative grades, and documents without one."""
    text = "q1 0 d1 1\nq1 0 d2 -2\nq2 0 d3 0\nq2 0 d4 3\n"
    (tmp_path / "a.txt").write_text(text)
    qrels = read_qrels(str(tmp_path / "a.txt"), "--qrels")
    assert qrels == pytrec_eval.parse_qrel(text.splitlines())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q1 0 d1 1\nq1 d2\n", ":2: expected"),
        ("q1\td1\tvery\n", ":1: expected"),
        ("q1 0 d1 ²\n", ":1: expected"),
        ("q1 0 d1 " + "9" * 5000, ":1: expected"),
        ("q1 0 d1 0.5\n", ":1: expected .* a whole number as grade"),
        ("q1 d1\nq1 d2\n", ":1: expected"),
        ("q1\td1\t\n", ":1: expected"),
        ("q1\t\t1\n", ":1: expected"),
        ("one\ttwo\tthree\nq1\td1\t1\n", ":1: expected .* may name the columns"),
        ("query\tdoc\tscore\tlabel\nq1\td1\t1\t2\n", ":1: expected"),  # two columns of grades
        ("query\tdoc\tscore\nq1\td1\t1\t2\n", ":2: expected"),  # a field more than the header
        ("q1 0 d1 1\nquery 0 doc score\n", ":2: expected"),
        ("query doc score\nq1 d2 1\nq1 d1 1\nq1 d1 2\n", ":4: q1 d1 has the grade 1 in line 3"),
        ("q1,d1," + "9" * 200_000, ":1: expected"),
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


@pytest.mark.parametrize(
    ("rows", "repeated", "texts"),
    [
        ([{"_id": "q1", "text": "a"}, {"_id": "q1", "text": "b"}], [(2, 1)], ["a"]),
        ([{"_id": "q1", "text": "a"}, {"id": "q1", "query": "a"}, {"_id": "q2", "text": "a"}], [], ["a", "a"]),
        ([{"_id": "q1", "text": "a"}, {"_id": "q1", "text": "a", "prompt": "p"}], [(2, 1)], ["a"]),
        ([{"_id": "q1", "text": t} for t in "abac"], [(2, 1), (4, 1)], ["a"]),
        ([{"_id": "q2", "text": f"{n}"} for n in range(20)], [(n, 1) for n in range(2, 21)], ["0"]),
        ([{"_id": "q3", "text": "a"}, {"_id": "q3", "text": "b"}, {"_id": "q2", "text": "a"}], [], ["a"]),  # unjudged
    ],
)
def test_a_query_id_with_two_texts(tmp_path, rows, repeated, texts):
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = survey(list_files(str(path), "--query_data"), 40, parse_query)
    joined = join(queries, WANTED, str(tmp_path / "judged.jsonl"))
    assert [line.replace(f"{path}:", "") for line in joined.repeated] == [
        f"{row}: query {rows[0]['_id']} has another text in {first}" for row, first in repeated
    ]
    groups = [parse_answered(json.loads(line)) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [group.query for group in groups] == texts and joined.queries == len(texts)
    assert [group.query.id for group in groups] == [row["_id"] for row in (rows[0], rows[-1])][-len(texts) :]


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
