"""Evaluation end to end on one Ray, against a plain numpy search and metrics written out here."""

import json
from math import log2

import numpy as np
import pytest

from raybge import evaluate_retrieval
from raybge.arguments import EvaluateArguments
from raybge.evaluate import INSTRUCTION, _encoder_options, main
from raybge.flags import build
from raybge.search import inputs


@pytest.fixture(scope="module")
def ray_of_four():
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """A corpus with duplicates, and queries of which two are alike, one names an answer twice, one lacks its own."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(150)]
    # queries share words with their answers, so that a random model finds some of them
    asked = [" ".join([*text.split()[:5], str(rng.choice(words))]) for text in texts]
    queries = [{"query": asked[i], "pos": [texts[i], texts[(i + 40) % 150]]} for i in range(60)]
    queries += [
        {"query": asked[0], "positive": texts[5]},
        {"query": asked[7], "pos": [texts[7], texts[7], "gone", "gone"]},
    ]
    folder = tmp_path_factory.mktemp("data")
    corpus = [{"text": text} for text in texts[:100]] + [{"content": text} for text in texts[90:]]
    return write(folder / "corpus.jsonl", corpus), write(folder / "dev.jsonl", queries), texts, queries


def expected(model, texts, queries, cutoffs):
    from raybge.model.encoder import Encoder

    encoder = Encoder(model, devices="cpu")
    scores = encoder.encode_queries([row["query"] for row in queries]) @ encoder.encode_corpus(texts).T
    sums = {f"{name}@{k}": 0.0 for name in ("nDCG", "Recall", "MAP", "MRR") for k in cutoffs}
    for row, ranking in zip(queries, np.argsort(-scores, axis=1, kind="stable"), strict=True):
        given = row.get("pos", row.get("positive"))
        wanted = {given} if isinstance(given, str) else set(given)
        for k in cutoffs:
            hits = [texts[i] in wanted for i in ranking[:k]]
            ideal = sum(1 / log2(r + 2) for r in range(min(k, len(wanted))))
            sums[f"nDCG@{k}"] += sum(hit / log2(r + 2) for r, hit in enumerate(hits)) / ideal
            sums[f"Recall@{k}"] += sum(hits) / len(wanted)
            sums[f"MAP@{k}"] += sum(hit * sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits)) / len(wanted)
            sums[f"MRR@{k}"] += next((1 / (r + 1) for r, hit in enumerate(hits) if hit), 0.0)
    return {name: total / len(queries) for name, total in sums.items()}


def test_metrics_equal_a_plain_search(ray_of_four, data, tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2048)
    corpus, dev, texts, queries = data
    written = tmp_path / "new" / "metrics.json"
    found = evaluate_retrieval(
        encoder=tiny_model,
        corpus_data=corpus,
        query_data=dev,
        k=12,
        shard_size=40,
        metrics_file=str(written),
        num_workers=2,
    )
    assert found["queries"] == 62 and found["corpus"] == 150
    metrics = {name: value for name, value in found.items() if "@" in name}
    assert metrics == pytest.approx(expected(tiny_model, texts, queries, (1, 10)))  # no @100: k is 12
    assert 0.1 < metrics["MRR@10"] < 1
    assert json.loads(written.read_text()) == found
    assert [path.name for path in written.parent.iterdir()] == ["metrics.json"]
    said = capfd.readouterr().out
    assert "pool of 150 passages (10 duplicates dropped) in 4 shards" in said
    assert "1 answers are not in the corpus" in said


def test_dry_run_stops_after_the_plan(ray_of_four, data, tiny_model, capfd):
    assert main(flags(tiny_model, data, dry_run=True)) == 0
    assert "queries up to 16 tokens" in capfd.readouterr().out


def test_lengths_and_instruction_come_from_flag_then_folder_then_recipe(tiny_model, tmp_path):
    def options(model, **more):
        return _encoder_options(build(EvaluateArguments, dict(encoder=model, corpus_data="c", query_data="q", **more)))

    lengths = ("query_max_length", "passage_max_length")
    assert [options(tiny_model)[name] for name in lengths] == [16, 16]
    assert [options(str(tmp_path))[name] for name in lengths] == [32, 128]
    assert [options(tiny_model, max_query_length=7, max_passage_length=9)[name] for name in lengths] == [7, 9]
    assert options(tiny_model)["query_instruction_for_retrieval"] is None
    assert options(tiny_model, add_instruction=True)["query_instruction_for_retrieval"] == INSTRUCTION


def flags(model, data, **changed):
    given = {"encoder": model, "corpus_data": data[0], "query_data": data[1], "num_workers": 1, **changed}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 0}, "--k must be at least 1"),
        ({"search_batch_size": 0}, "--search_batch_size must be at least 1"),
        ({"encoder": "./nowhere"}, "--encoder ./nowhere: no such folder"),
        ({"corpus_data": "nowhere.jsonl"}, "--corpus_data: nowhere.jsonl is not there"),
        ({"query_data": "nowhere.jsonl"}, "--query_data: nowhere.jsonl is not there"),
        ({"index_factory": "Flta"}, "--index_factory Flta: faiss makes no index of it"),
        ({"save_embedding": True}, "--save_embedding is not built yet"),
        ({"metrics_file": "."}, "--metrics_file: . is a folder"),
    ],
)
def test_flags_that_cannot_be_are_named(data, tiny_model, capfd, monkeypatch, changed, said):
    monkeypatch.setattr(inputs, "connect", lambda *given: pytest.fail("Ray was started"))
    assert main(flags(tiny_model, data, **changed)) == 2
    assert said in capfd.readouterr().err


def test_a_bad_row_is_named_before_ray_starts(data, tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(inputs, "connect", lambda *given: pytest.fail("Ray was started"))
    dev = write(tmp_path / "dev.jsonl", [{"query": "q", "pos": ["p"]}, {"query": "q"}])
    assert main(flags(tiny_model, data, query_data=dev)) == 2
    assert 'dev.jsonl:2: "pos" must be' in capfd.readouterr().err
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert main(flags(tiny_model, data, corpus_data=corpus)) == 2
    assert "corpus.jsonl:2: the row must be UTF-8" in capfd.readouterr().err


def test_metrics_may_not_be_written_over_the_input(data, tiny_model, capfd):
    assert main(flags(tiny_model, data, metrics_file=data[1])) == 2
    assert "is a file that --query_data reads" in capfd.readouterr().err
