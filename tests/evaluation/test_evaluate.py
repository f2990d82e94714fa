"""Evaluation end to end on one Ray, compared with a numpy search and metrics computed here."""

import json
import re
from dataclasses import asdict
from math import log2
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from pages import Page
from tiny import make_tiny

from raybge import evaluate_retrieval
from raybge.cli.options import EvaluateOptions
from raybge.cli.parser import build_options
from raybge.evaluate import main
from raybge.evaluation import estimate
from raybge.evaluation.spec import INSTRUCTION, EvaluationSpec, Ranking, evaluation_encoder
from raybge.search import inputs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """A corpus with duplicates, and queries: two are equal, one repeats an answer, one has an absent answer."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(150)]
    # queries share words with their answers, so that a random model retrieves some of them
    asked = [" ".join([*text.split()[:5], str(rng.choice(words))]) for text in texts]
    queries = [{"query": asked[i], "pos": [texts[i], texts[(i + 40) % 150]]} for i in range(60)]
    queries += [
        {"query": asked[0], "positive": texts[5]},
        {"query": asked[7], "pos": [texts[7], texts[7], "gone", "gone"]},
    ]
    folder = tmp_path_factory.mktemp("data")
    corpus = [{"text": text} for text in texts[:100]] + [{"content": text} for text in texts[90:]]
    return write(folder / "corpus.jsonl", corpus), write(folder / "dev.jsonl", queries), texts, queries


def expected(model, texts, queries, cutoffs, max_rank):
    from raybge.model.encoder import Encoder

    encoder = Encoder(model, devices="cpu")
    scores = encoder.encode_queries([row["query"] for row in queries]) @ encoder.encode_corpus(texts).T
    names = ("nDCG", "Recall", "MAP", "MRR", "Precision", "HitRate", "RecallCap")
    sums = {f"{name}@{k}": 0.0 for name in names for k in cutoffs}
    pairs = []
    for row, score, ranking in zip(queries, scores, np.argsort(-scores, axis=1, kind="stable"), strict=True):
        positives = row.get("pos", row.get("positive"))
        relevant = {positives} if isinstance(positives, str) else set(positives)
        pairs += [(score[i], texts[i] in relevant) for i in ranking[:max_rank]]
        for k in cutoffs:
            hits = [texts[i] in relevant for i in ranking[:k]]
            ideal = sum(1 / log2(r + 2) for r in range(min(k, len(relevant))))
            sums[f"nDCG@{k}"] += sum(hit / log2(r + 2) for r, hit in enumerate(hits)) / ideal
            sums[f"Recall@{k}"] += sum(hits) / len(relevant)
            sums[f"MAP@{k}"] += sum(hit * sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits)) / len(relevant)
            sums[f"Precision@{k}"] += sum(hits) / k
            sums[f"HitRate@{k}"] += any(hits)
            sums[f"RecallCap@{k}"] += sum(hits) / min(k, len(relevant))
            sums[f"MRR@{k}"] += next((1 / (r + 1) for r, hit in enumerate(hits) if hit), 0.0)
    over = [a > b for a, hit in pairs if hit for b, other in pairs if not other]
    return {f"AUC@{max_rank}": np.mean(over)} | {name: total / len(queries) for name, total in sums.items()}


def test_metrics_equal_a_numpy_search(ray_cluster, data, tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2048)
    corpus, dev, texts, queries = data
    metrics_file = tmp_path / "new" / "metrics.json"
    result = evaluate_retrieval(
        encoder=tiny_model,
        corpus_data=corpus,
        query_data=dev,
        k=12,
        shard_size=40,
        metrics_file=str(metrics_file),
        num_workers=2,
    )
    assert result.counts == {"queries": 62, "corpus": 150}
    assert json.loads(metrics_file.read_text()) == {**result.metrics, **result.counts}
    assert result.report == f"{metrics_file}.report.html"
    metrics = dict(result.metrics)
    reference = expected(tiny_model, texts, queries, (1, 10), 12)
    # the last bits of a score depend on the batch, and equal passages of equal queries tie
    assert metrics.pop("AUC@12") == pytest.approx(reference.pop("AUC@12"), abs=1e-3)
    assert metrics == pytest.approx(reference, abs=1e-6)  # no @100: k is 12
    assert 0.1 < metrics["MRR@10"] < 1
    assert sorted(path.name for path in metrics_file.parent.iterdir()) == ["metrics.json", "metrics.json.report.html"]
    output = capfd.readouterr().out
    assert "pool of 150 passages (10 duplicates dropped) in 4 shards" in output
    assert "1 relevant passages are not in the corpus" in output


@pytest.fixture(scope="module")
def beir(tmp_path_factory, data, words):
    """A BEIR folder: documents with titles, some with equal texts, four that are queries; grades from -1 to 2.

    Some judged ids are unknown. A document is there twice, and one id has two texts.
    """
    _, _, texts, _ = data
    random = np.random.default_rng(4)
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    queries = [{"_id": f"q{i}", "text": " ".join(texts[i].split()[:4])} for i in range(40)]
    documents = [{"_id": f"d{i}", "title": words[i], "contents": texts[i // 2]} for i in range(90)]
    documents[10]["title"] = documents[11]["title"] = documents[12]["contents"] = ""
    documents += [{"_id": query["_id"], "title": "", "text": query["text"]} for query in queries[:4]]
    documents[-1]["text"] = f"{words[0]} {documents[-1]['text']} {words[1]}"
    lines = ["qid\tdocid\trel"]
    for i in range(30):
        grades = {2 * i: 2, 2 * i + 1: int(random.integers(-1, 3)), int(random.integers(60, 90)): 0}
        lines += [f"q{i}\td{d}\t{grade}.0" for d, grade in grades.items()]
    lines += ["q2\tq2\t1", "q3\tgone\t1", "q31\td1\t0"]
    repeated = [documents[5], {**documents[6], "contents": "another text"}]
    write(folder / "corpus.jsonl", documents + repeated), write(folder / "queries.jsonl", queries)
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder, documents, queries, [line.split("\t") for line in lines[1:]]


def test_beir_folder_equals_a_numpy_search_and_trec_eval(ray_cluster, beir, tiny_model, tmp_path, monkeypatch, capfd):
    """Documents with equal texts are two documents. trec_eval gives the same metrics for the run file."""
    from raybge.model.encoder import Encoder

    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2048)
    folder, documents, queries, lines = beir
    run_file, metrics_file = tmp_path / "run.txt", tmp_path / "metrics.json"
    flags = dict(encoder=tiny_model, corpus_data=str(folder), query_data=str(folder), k=10, num_workers=1)
    assert main(argv(flags)) == 2
    path = folder / "corpus.jsonl"
    assert f"{path}:96: document d6 has another text in {path}:7\n" in capfd.readouterr().err
    flags |= dict(run_file=str(run_file), metrics_file=str(metrics_file), on_bad_rows="skip")
    result = evaluate_retrieval(**flags)
    output = capfd.readouterr().out
    assert result.counts == {"queries": 30, "corpus": 94}
    for message in (
        f"--corpus_data: 1 row skipped, whose id an earlier row has\n{path}:96: document d6 has another text",
        "10 queries without a relevant document are skipped",
        "1 relevant passages are not in the corpus",
        "--drop_self_hits: 4 hits that are the query itself are dropped, 1 of them judged relevant",
        "--drop_self_hits: 1 of them have another text than the query",
    ):
        assert message in output

    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in lines[:-1]:
        qrels.setdefault(query, {})[document] = int(float(grade))
    encoder = Encoder(tiny_model, devices="cpu")
    names = [each["_id"] for each in documents]
    texts = [f"{each['title']} {each.get('contents', each.get('text'))}".strip() for each in documents]
    scores = encoder.encode_queries([each["text"] for each in queries[:30]]) @ encoder.encode_corpus(texts).T
    ranked = np.argsort(-scores.round(5), axis=1, kind="stable")  # the last bits of a score depend on the batch
    numpy_run = {}
    for query, row in enumerate(ranked):
        best = [names[d] for d in row if names[d] != f"q{query}"][:10]
        numpy_run[f"q{query}"] = {name: -float(rank) for rank, name in enumerate(best)}
    run = pytrec_eval.parse_run(run_file.read_text().splitlines())
    trec_names = {"ndcg_cut_10": "nDCG@10", "recall_10": "Recall@10", "map_cut_10": "MAP@10", "recip_rank": "MRR@10"}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "map_cut.10", "recip_rank"})
    for each, tolerance in ((numpy_run, 1e-6), (run, 1e-9)):
        values = evaluator.evaluate(each)
        for theirs, ours in trec_names.items():
            mean = np.mean([values[f"q{i}"][theirs] for i in range(30)])
            assert result.metrics[ours] == pytest.approx(mean, abs=tolerance)
    assert 0.03 < result.metrics["nDCG@10"] < 0.95
    counts = {"dropped_self_hits": 4, "dropped_relevant_self_hits": 1, "dropped_self_hits_with_other_text": 1}
    assert counts.items() <= json.loads(metrics_file.read_text()).items()


def test_models_are_compared_query_by_query(ray_cluster, data, tiny_model, other_model, tmp_path, capfd):
    flags = dict(corpus_data=data[0], query_data=data[1], k=10, num_workers=1)
    alone = [evaluate_retrieval(encoder=model, **flags).metrics for model in (tiny_model, other_model)]
    capfd.readouterr()
    metrics_file = tmp_path / "metrics.json"
    result = evaluate_retrieval(encoder=tiny_model, compare=[other_model], metrics_file=str(metrics_file), **flags)
    assert result.metrics == pytest.approx(alone[0])
    comparison = json.loads(metrics_file.read_text())["compare"][other_model]
    assert comparison == asdict(result.comparison[other_model])
    assert comparison["metrics"] == pytest.approx(alone[1])
    difference = comparison["difference"]["nDCG@10"]
    assert difference["mean"] == pytest.approx(alone[0]["nDCG@10"] - alone[1]["nDCG@10"], abs=1e-6)
    assert difference["low"] < difference["mean"] < difference["high"]
    assert difference["wins"] > 0 and difference["losses"] > 0 and difference["wins"] + difference["losses"] <= 62
    page = (tmp_path / "metrics.json.report.html").read_text()
    assert "<h2>Largest differences</h2>" in page and page.count('class="query"') > 20  # and 10 of the worst queries
    assert f"<title>nDCG@10 {result.metrics['nDCG@10']:.4f} · metrics.json · {Path(tiny_model).name} · " in page
    output = capfd.readouterr().out
    row = f"{difference['mean']:+.4f}  {difference['low']:+.4f} to {difference['high']:+.4f}"
    assert f"{tiny_model} compared with {other_model}" in output and row in output
    page = Page((tmp_path / "metrics.json.report.html").read_text())
    assert row.replace("  ", "") in page.text  # the sign is that of the report


def test_saved_embeddings_are_used_by_other_runs(
    ray_cluster, data, tiny_model, other_model, tmp_path, monkeypatch, capfd
):
    """Loaded vectors are searched; a file of another model or corpus, or an invalid one, is an error."""
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2048)
    path = tmp_path / "vectors"
    flags = dict(corpus_data=data[0], query_data=data[1], k=10, num_workers=2, save_path=str(path))
    saved = evaluate_retrieval(encoder=tiny_model, save_embedding=True, **flags)
    vectors = np.memmap(path, np.float32, "r+", 4096, (150, 32))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert evaluate_retrieval(encoder=tiny_model, load_embedding=True, **flags) == saved

    def assert_error(message, model=tiny_model, **changed):
        assert main(["--load_embedding", *argv({"encoder": model, **flags, **changed})]) == 2
        assert message in capfd.readouterr().err

    assert_error("was saved with another model or other flags", other_model)
    assert_error("was saved with another model or other flags", passage_max_len=8)
    rows = [json.loads(line) for line in Path(data[0]).read_text().splitlines()]
    assert_error("holds 150 passages, but --corpus_data has 149", corpus_data=write(tmp_path / "less.jsonl", rows[1:]))
    rows[0]["text"] = "another"
    assert_error("holds the vectors of other passages", corpus_data=write(tmp_path / "other.jsonl", rows))
    vectors[:] = vectors[::-1].copy()
    other = evaluate_retrieval(encoder=tiny_model, load_embedding=True, **flags)
    assert other.metrics["MRR@10"] < saved.metrics["MRR@10"] / 2
    path.write_bytes(path.read_bytes()[:-1])
    assert_error("is truncated")
    path.write_text("something else")
    assert_error("was not written by --save_embedding")
    path.unlink()
    assert_error("cannot be read")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, words):
    """tiny_model with other weights."""
    import torch

    from raybge.model.encoder import Encoder
    from raybge.model.folder import FolderSettings, write_settings

    folder = tmp_path_factory.mktemp("other")
    make_tiny(folder, pooler=False, words=words, vocab_size=4 + len(words), hidden_size=32, intermediate_size=64)
    write_settings(folder, FolderSettings(pooling="cls", normalize=True, max_length=16), 32, {})
    encoder = Encoder(str(folder), devices="cpu")
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    encoder.save(folder)
    return str(folder)


def test_dry_run_stops_after_the_plan(ray_cluster, data, tiny_model, capfd):
    assert main(flags(tiny_model, data, dry_run=True)) == 0
    assert "queries up to 16 tokens" in capfd.readouterr().out


def test_more_ranks_than_passages(ray_cluster, data, tiny_model, tmp_path, capfd):
    """All passages are ranked, so every relevant one in the corpus is retrieved."""
    _, _, texts, _ = data
    corpus = write(tmp_path / "corpus.jsonl", [{"text": text} for text in texts[:30]])
    dev = write(tmp_path / "dev.jsonl", [{"query": texts[3], "pos": [texts[29], texts[4]]}])
    metrics = evaluate_retrieval(encoder=tiny_model, corpus_data=corpus, query_data=dev, num_workers=1).metrics
    assert "--k 100: the corpus has only 30 passages; all of them are ranked" in capfd.readouterr().out
    assert metrics["Recall@100"] == 1 and metrics["Precision@100"] == pytest.approx(2 / 100)


def test_empty_corpus_is_an_error(data, tiny_model, tmp_path, capfd):
    corpus = tmp_path / "corpus.jsonl"
    corpus.touch()
    assert main(flags(tiny_model, data, corpus_data=corpus)) == 2
    assert capfd.readouterr().err == f"raybge.evaluate: --corpus_data: {corpus} is an empty file\n"


def test_estimate_of_a_long_evaluation(ray_cluster, data, tiny_model, monkeypatch, capfd):
    """212 texts at 50 per second on each of two workers; 62 x 150 pairs at 1,550 on each."""
    monkeypatch.setattr(estimate, "MIN_TEXTS", 213)
    assert main(flags(tiny_model, data, dry_run=True, num_workers=2)) == 0
    assert "estimate" not in capfd.readouterr().out
    monkeypatch.setattr(estimate, "MIN_TEXTS", 212)
    assert main(flags(tiny_model, data, dry_run=True, num_workers=2)) == 0
    assert re.search(r"encoding 212 texts \d+ s \([1-9][\d,]* per second on one of 2 workers\)", capfd.readouterr().out)
    monkeypatch.setattr(estimate, "_trial_rates", lambda *_: (50.0, 1550.0))
    assert main(flags(tiny_model, data, dry_run=True, num_workers=2)) == 0
    line = "estimate: encoding 212 texts 2 s (50 per second on one of 2 workers), searching 3 s; 0.0 GB of vectors"
    assert line in capfd.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (150, "2.5 min"), (3600, "60 min"), (7200, "2.0 h"), (1e6, "278 h")],
)
def test_format_time(seconds, text):
    assert estimate.format_time(seconds) == text


def test_lengths_come_from_flags_then_folder_then_defaults(tiny_model, tmp_path):
    def encoder(model, **more):
        options = build_options(EvaluateOptions, dict(encoder=model, corpus_data="c", query_data="q", **more))
        return evaluation_encoder(options, options.model_name_or_path)

    def lengths(model, **more):
        spec = encoder(model, **more)
        return spec.query_max_length, spec.passage_max_length

    assert lengths(tiny_model) == (16, 16)
    assert lengths(str(tmp_path)) == (32, 128)
    assert lengths(tiny_model, query_max_len=7, passage_max_len=9) == (7, 9)
    assert encoder(tiny_model).query_instruction_for_retrieval is None
    assert encoder(tiny_model, add_instruction=True).query_instruction_for_retrieval == INSTRUCTION


@pytest.mark.parametrize(
    ("changed", "drops"),
    [
        ({}, False),
        ({"drop_self_hits": True}, True),
        ({"qrels": "a.tsv"}, False),  # documents and queries that are numbered have equal ids by chance
        ({"qrels": "a.tsv", "drop_self_hits": True}, True),
        ({"corpus_data": "beir", "query_data": "beir"}, True),
        ({"corpus_data": "beir", "query_data": "beir", "drop_self_hits": "False"}, False),
    ],
)
def test_self_hits_of_beir_folders_are_dropped_by_default(tiny_model, tmp_path, monkeypatch, changed, drops):
    monkeypatch.chdir(tmp_path)
    Path("beir", "qrels").mkdir(parents=True)
    values = {"encoder": tiny_model, "corpus_data": "c.jsonl", "query_data": "q.jsonl", "k": 7, **changed}
    ranking = EvaluationSpec.from_options(build_options(EvaluateOptions, values)).ranking
    assert ranking == Ranking(7, drops) and ranking.depth == 7 + drops


def flags(model, data, **changed):
    return argv({"encoder": model, "corpus_data": data[0], "query_data": data[1], "num_workers": 1, **changed})


def argv(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, "--k must be at least 1"),
        ({"search_batch_size": 0}, "--search_batch_size must be at least 1"),
        ({"encoder": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
        ({"qrels": "nowhere.tsv"}, "--qrels: nowhere.tsv cannot be read"),
        ({"corpus_data": "nowhere.jsonl"}, "--corpus_data: nowhere.jsonl: no such file or folder"),
        ({"query_data": "nowhere.jsonl"}, "--query_data: nowhere.jsonl: no such file or folder"),
        ({"index_factory": "Flta"}, "--index_factory Flta: faiss cannot build this index"),
        ({"save_embedding": True, "compare": "m"}, "--save_embedding applies to a single model"),
        ({"save_embedding": True, "load_embedding": True}, "exclude each other"),
        ({"compare": "./nowhere"}, "--compare ./nowhere: no such folder"),
        ({"metrics_file": "."}, "--metrics_file: . is a folder"),
        ({"drop_self_hits": "maybe"}, "--drop_self_hits"),
    ],
)
def test_invalid_flags_are_reported(data, tiny_model, capfd, monkeypatch, changed, message):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    assert main(flags(tiny_model, data, **changed)) == 2
    assert message in capfd.readouterr().err


def test_invalid_row_is_reported_before_ray_starts(data, tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    dev = write(tmp_path / "dev.jsonl", [{"query": "q", "pos": ["p"]}, {"query": "q"}])
    assert main(flags(tiny_model, data, query_data=dev)) == 2
    assert 'dev.jsonl:2: "pos" must be' in capfd.readouterr().err
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert main(flags(tiny_model, data, corpus_data=corpus)) == 2
    assert "corpus.jsonl:2: the row must be UTF-8" in capfd.readouterr().err


def test_metrics_file_must_not_be_an_input(data, tiny_model, capfd):
    assert main(flags(tiny_model, data, metrics_file=data[1])) == 2
    assert "is a file that --query_data reads" in capfd.readouterr().err
