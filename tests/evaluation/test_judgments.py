"""Measuring without Ray: random BEIR folders against pytrec_eval on the run file that is written."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from local_shuffle import use_local_shuffle

from raybge.cli.console import Console
from raybge.data.groups import id_key, parse_document, parse_judged, text_key
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.evaluation import judgments
from raybge.evaluation.judgments import known_texts, measure_block, write_judged_queries
from raybge.evaluation.spec import Ranking, RetrievalFiles
from raybge.search import topk
from raybge.search.block_reader import PassageReader, QueryReader
from raybge.search.columns import keys_of
from raybge.search.deduplication import deduplicate
from raybge.search.index import SearchHits
from raybge.search.inputs import InputFiles
from raybge.search.key_table import KeyTable, key_words
from raybge.search.search_data import single_passage
from raybge.search.shards import KnownPassages
from raybge.search.store import Store
from raybge.util.errors import UserError

METRICS = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "Precision": "P", "HitRate": "success"}
CUTOFFS = (1, 10, 100)
HALF = np.float32(0.5)
# Many ties, neighbors that differ in the last bit, both zeros, and the smallest number.
SCORES = np.array([0.5, np.nextafter(HALF, HALF + 1), np.nextafter(HALF, 0), 0, -0.0, 1e-45, -0.25, 7], np.float32)
FORMATS = [  # header, line
    ("query-id\tcorpus-id\tscore", "{query}\t{document}\t{grade}"),
    ("qid docno label", "{query} {document} {grade}"),
    ("corpus_id,score,query_id", "{document},{grade}.0,{query}"),
    ("", "{query} 0 {document} {grade}"),
]


@dataclass
class BeirFolder:
    """Documents and queries, texts by id, and judgments: grades by query and document."""

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    form: tuple[str, str] = FORMATS[0]
    repeated: float = 0.0  # share of rows that are written twice
    later: list[dict] = field(default_factory=list)  # further rows of the corpus

    def write(self, path, random):
        path.mkdir(parents=True)
        for name, texts in (("corpus", self.documents), ("queries", self.queries)):
            rows = [{"_id": name, "text": text} for name, text in texts.items()]
            rows += [row for row in rows if random.random() < self.repeated] + (self.later if name == "corpus" else [])
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        header, line = self.form
        lines = [
            line.format(query=query, document=document, grade=grade)
            for query, own in self.qrels.items()
            for document, grade in own.items()
        ]
        (path / "qrels.txt").write_text("\n".join([header, *lines]))
        names = ("corpus.jsonl", "queries.jsonl", "qrels.txt")
        corpus, queries, qrels = (str(path / name) for name in names)
        return RetrievalFiles((corpus,), (queries,), qrels)


def random_folder(random):
    """Ids in common to documents and queries, equal rows, grades below 1, judgments of absent documents."""
    names = [f"{letter}{number}" for number in range(7) for letter in "dq"]
    present = random.permutation(names)[: random.integers(1, 15)]
    documents = {str(name): f"text {random.integers(4)}" for name in present}
    queries = {
        f"q{i}": documents.get(f"q{i}", "x") if random.random() < 0.7 else "y" for i in range(random.integers(1, 6))
    }
    qrels = {query: {d: int(random.integers(-2, 4)) for d in names if random.random() < 0.4} for query in queries}
    qrels["q0"]["d0"] = 1
    return BeirFolder(documents, queries, qrels, FORMATS[random.integers(len(FORMATS))], repeated=0.2)


@dataclass
class Measurement:
    """Result of `measure`, and what it was computed from."""

    metrics: object
    queries: list[str]
    documents: list[str]
    scores_QP: np.ndarray


def measure(folder, path, ranking, random):
    """Take all steps from the files to the metrics, with random scores in place of the model's."""
    files = folder.write(path / "beir", random)
    rows = InputFiles(list_files(files.queries, "--query_data"), "--query_data", parse_judged)
    judged = write_judged_queries(files, rows, str(path / "work"), Console())
    corpus, queries = (
        survey(list_files(files.corpus, "--corpus_data"), 400, parse_document),
        survey(judged.files, 1 << 20, judged.parse),
    )
    arguments = (parse_document, single_passage)
    unique = deduplicate(corpus, *arguments, Store(str(path / "store")), id_key, compare_texts=True)
    readers = [
        PassageReader(number, corpus.files[0], block, *arguments, id_key, unique.reader(number))
        for number, block in enumerate(corpus.blocks)
    ]
    passages = pa.concat_tables([table for reader in readers for table in reader()])
    reader = QueryReader(0, queries.files[0], queries.blocks[0], queries.total_rows, judged.parse, known_texts, id_key)
    [table] = reader()
    scores_QP = random.choice(SCORES, (len(table), len(passages)))
    ids_QP = np.broadcast_to(np.arange(len(passages)), scores_QP.shape)
    scores_QK, ids_QK = topk.top(scores_QP, ids_QP, min(ranking.depth, len(passages)))
    key_M, id_M = KeyTable(keys_of(passages)[0]).find(keys_of(table)[0])
    columns = {name: passages[name].to_pylist() for name in ("id", "text")}
    lookup = SimpleNamespace(
        names=lambda ids: {i: columns["id"][i] for i in ids.tolist()},
        texts=lambda ids: {i: columns["text"][i] for i in ids.tolist()},
    )
    known = KnownPassages(key_M, id_M, np.zeros(len(id_M), np.float32))
    metrics = measure_block(SearchHits(table, scores_QK, ids_QK, known), ranking, True, lookup)
    return Measurement(metrics, [json.loads(row)["id"] for row in table["text"].to_pylist()], columns["id"], scores_QP)


def trec_metrics(qrels, run, k):
    """Return the metrics of trec_eval, by the names of raybge, of each query of a run."""
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= k]
    at = ",".join(map(str, cutoffs))
    values = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{at}" for name in METRICS.values()}).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    best = {c: {q: dict(sorted(own.items(), key=lambda x: -x[1])[:c]) for q, own in run.items()} for c in cutoffs}
    ranks = {cutoff: reciprocal.evaluate(best[cutoff]) for cutoff in cutoffs}
    return {
        query: {f"{ours}@{c}": own[f"{trec}_{c}"] for ours, trec in METRICS.items() for c in cutoffs}
        | {f"MRR@{c}": ranks[c][query]["recip_rank"] for c in cutoffs}
        for query, own in values.items()
    }


def as_beir(result, query, k, drop):
    """Return a query's best documents as BEIR ranks them, without the query itself before the cut; ties by position."""
    scores = zip(result.documents, result.scores_QP[result.queries.index(query)].tolist(), strict=True)
    ranked = sorted(scores, key=lambda each: -each[1])
    return [document for document, _ in ranked if not drop or document != query][:k]


def test_random_beir_folders_equal_trec_eval_on_the_run_file(tmp_path, monkeypatch):
    use_local_shuffle(monkeypatch)
    random = np.random.default_rng(0)
    dropped = 0
    for number in range(1000):
        folder = random_folder(random)
        ranking = Ranking(int(random.choice([1, 3, 10, 12, 100])), bool(random.random() < 0.8))
        result = measure(folder, tmp_path / str(number), ranking, random)
        run = pytrec_eval.parse_run(result.metrics.run_lines.decode().splitlines())
        answered = {query: own for query, own in folder.qrels.items() if max(own.values(), default=0) > 0}
        assert sorted(result.queries) == sorted(answered)
        of_run = trec_metrics(answered, run, ranking.k)
        best = {query: as_beir(result, query, ranking.k, ranking.drop_self_hits) for query in result.queries}
        of_beir = trec_metrics(
            answered, {q: {d: -float(r) for r, d in enumerate(own)} for q, own in best.items()}, ranking.k
        )
        for row, query in enumerate(result.queries):
            ours = {name: values[row] for name, values in result.metrics.values.items() if "RecallCap" not in name}
            zero = dict.fromkeys(ours, 0.0)  # trec_eval leaves out a query without a hit
            for theirs in (of_run.get(query, zero), of_beir.get(query, zero)):
                assert ours.keys() == theirs.keys()
                assert max(abs(value - theirs[name]) for name, value in ours.items()) < 1e-9
            assert sorted(run.get(query, {}), key=lambda d: -run[query][d]) == best[query]
        dropped += result.metrics.self_hits[0]
    assert dropped > 300


# --- hits that are the query itself -----------------------------------------------------------------------------------


def texts_by_id(names):
    return {name: f"text of {name}" for name in names.split()}


@pytest.mark.parametrize(
    ("documents", "query", "judged", "hits", "counts"),
    [
        (texts_by_id("q1 a b c"), "text of q1", {"a": 1}, "a b c", (1, 0, 0)),
        (texts_by_id("a b q1 c"), "Text  of q1", {"a": 1, "q1": 1}, "a b c", (1, 1, 0)),
        (texts_by_id("a b q1 c"), "text of q1", {"a": 1, "q1": 0}, "a b c", (1, 0, 0)),
        (texts_by_id("a b c q1 d"), "text of q1", {"a": 1, "q1": 1}, "a b c", (0, 0, 0)),  # below the cut
        (texts_by_id("q1 a b c"), "which text?", {"a": 1}, "a b c", (1, 0, 1)),  # equal ids by chance
        (texts_by_id("q1 a b c"), "of", {"a": 1}, "a b c", (1, 0, 1)),
        ({**texts_by_id("a b"), "q1": "Title the text"}, "the text", {"a": 1}, "a b", (1, 0, 0)),
        ({**texts_by_id("a b"), "q1": "Title the text"}, "title", {"a": 1}, "a b", (1, 0, 0)),
        (texts_by_id("q1"), "text of q1", {"a": 1}, "", (1, 0, 0)),  # nothing else
        (texts_by_id("a q b"), "text of q", {"a": 1}, "a q b", (0, 0, 0)),  # the text, but not the id
    ],
)
def test_hits_with_the_id_of_the_query_are_dropped_before_the_cut(
    documents, query, judged, hits, counts, tmp_path, monkeypatch
):
    use_local_shuffle(monkeypatch)
    folder = BeirFolder(documents, {"q1": query}, {"q1": judged})
    in_order = SimpleNamespace(
        choice=lambda _, shape: np.broadcast_to(-np.arange(shape[1], dtype=np.float32), shape), random=lambda: 1.0
    )
    metrics = measure(folder, tmp_path / "drop", Ranking(3, True), in_order).metrics
    assert [line.split()[2] for line in metrics.run_lines.decode().splitlines()] == hits.split()
    assert metrics.self_hits == counts
    metrics = measure(folder, tmp_path / "keep", Ranking(3, False), in_order).metrics
    assert [line.split()[2] for line in metrics.run_lines.decode().splitlines()] == [*documents][:3]
    assert metrics.self_hits == (0, 0, 0)


@pytest.mark.parametrize("drop", [True, False])
def test_without_ids_the_text_of_the_query_is_dropped(drop):
    row, passages = {"query": "b", "pos": ["a", "b"]}, ["c", "b", "a"]
    keys = KeyTable(key_words([text_key(text) for text in passages]))
    key_M, id_M = keys.find(key_words([text_key(text) for text in known_texts(parse_judged(row))]))
    table = pa.table({"text": [json.dumps(row)], "file": [0], "offset": [0]})
    known = KnownPassages(key_M, id_M, np.zeros(len(id_M), np.float32))
    hits = SearchHits(table, np.array([[3, 2, 1]], np.float32), np.arange(3)[None], known)
    lookup = SimpleNamespace(texts=lambda ids: {i: passages[i] for i in ids.tolist()})
    metrics = measure_block(hits, Ranking(2 + (not drop), drop), False, lookup)
    assert metrics.values["Recall@1"].tolist() == [0]
    assert metrics.relevant_scores.tolist() == ([1] if drop else [2, 1]) and metrics.other_scores.tolist() == [3]
    assert metrics.self_hits == ((1, 1, 0) if drop else (0, 0, 0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"_id": "a"}, {"_id": "b"}], ""),
        (
            [{"_id": "a"}, {"id": "a"}, {"_id": "b"}],
            "1 id of several queries each, which trec_eval takes for one query",
        ),
        ([{"_id": 1}, {"_id": "1"}, {"id": "c"}, {"id": "c"}], "2 ids of several queries each"),
        ([{"_id": None}, {"id": None}, {}], ""),  # named by their positions
        ([{"_id": "a b"}, {"_id": "c"}], "1 line with white space in an id, which trec_eval cannot read"),
    ],
)
def test_names_that_trec_eval_would_misread_are_counted(rows, message, capsys):
    raws = [json.dumps({"query": f"{number}", "pos": ["a"], **row}) for number, row in enumerate(rows)]
    table = pa.table({"text": raws, "file": [0] * len(rows), "offset": [*range(len(rows))]})
    known = KnownPassages(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    hits = SearchHits(table, np.ones((len(rows), 1), np.float32), np.zeros((len(rows), 1), np.int64), known)
    metrics = measure_block(hits, Ranking(1), True, SimpleNamespace(names=lambda ids: {0: "d"}))
    judgments._report_hits([metrics], Ranking(1), Console())
    assert message in capsys.readouterr().out and (
        message or len(pytrec_eval.parse_run(metrics.run_lines.decode().splitlines())) == len(rows)
    )


@pytest.mark.parametrize("on_bad_rows", ["stop", "skip"])
def test_a_query_id_with_two_texts_is_reported(tmp_path, on_bad_rows, capsys):
    folder = BeirFolder(texts_by_id("a"), {"q1": "text"}, {"q1": {"a": 1}})
    files = replace(folder.write(tmp_path / "beir", np.random.default_rng(0)), on_bad_rows=on_bad_rows)
    with open(files.queries[0], "a") as out:
        out.write('{"_id": "q1", "text": "other"}\n')
    rows = InputFiles(list_files(files.queries, "--query_data"), "--query_data", parse_judged)
    message = f"{files.queries[0]}:2: query q1 has another text in {files.queries[0]}:1\n"
    if on_bad_rows == "stop":
        with pytest.raises(UserError) as error:
            write_judged_queries(files, rows, str(tmp_path / "work"), Console())
        assert message in str(error.value) and "--on_bad_rows skip" in str(error.value)
    else:
        judged = write_judged_queries(files, rows, str(tmp_path / "work"), Console())
        assert f"--query_data: 1 row skipped, whose id an earlier row has\n{message}" in capsys.readouterr().out
        assert survey(judged.files, 100, judged.parse).total_rows == 1
