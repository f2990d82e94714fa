"""Evaluation in training, compared with a numpy search and `raybge.evaluate`; one process compared with several."""

import itertools
import json
import os
from math import log2
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from process_runtime import run_in_processes

from raybge import evaluate_retrieval
from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.data.token_cache import TokenCache
from raybge.evaluation import in_training, validation_data
from raybge.evaluation.in_training import RetrievalValidator
from raybge.evaluation.spec import ValidationSpec
from raybge.evaluation.validation_data import ValidationData, prepare
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

QUERY_LEN, PASSAGE_LEN = 8, 9
INSTRUCTIONS = dict(query_instruction_for_retrieval="ak ", passage_instruction_for_retrieval="bl ")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """(corpus, dev, texts, rows): a corpus with duplicates, and queries with prompts, several or absent answers."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, int(rng.integers(5, 12)))) for _ in range(120)]
    rows = [{"query": " ".join([*texts[i].split()[:5], str(rng.choice(words))]), "pos": [texts[i]]} for i in range(50)]
    for i, row in enumerate(rows):
        row["neg"] = [texts[j] for j in rng.integers(0, 120, i % 4)]
    rows[3]["pos"] = [texts[3], texts[70], texts[3]]
    rows[4]["pos"] = ["gone", texts[4]]
    rows[5] = {"query": rows[5]["query"], "positive": texts[5]}
    for row in rows[5:20]:
        row["prompt"] = "cm dn eo "
    folder = tmp_path_factory.mktemp("data")
    corpus = [{"text": text} for text in texts[:100]] + [{"content": text} for text in texts[90:]]
    return write(folder / "corpus.jsonl", corpus), write(folder / "dev.jsonl", rows), texts, rows


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(validation_data, "BLOCK_BYTES", 512)


def options_of(tiny_model, **flags):
    required = dict(model_name_or_path=tiny_model, train_data="none.jsonl", output_dir="none", query_max_len=QUERY_LEN)
    return build_options(TrainOptions, {**required, "passage_max_len": PASSAGE_LEN, **flags})


def data_of(tiny_model, storage, **flags) -> ValidationData:
    prepared = prepare(ValidationSpec.from_options(options_of(tiny_model, **flags)), storage)
    assert prepared is not None
    return prepared


def pool_of(rows):
    """Every `pos` and `neg`, in the order of their first occurrence."""
    texts = [[row["positive"]] if "positive" in row else row["pos"] + row.get("neg", []) for row in rows]
    return list(dict.fromkeys(itertools.chain.from_iterable(texts)))


def expected(encoder, texts, rows):
    """Metrics of one search over the whole corpus."""
    query_texts = [encoder.query_text(row["query"], row.get("prompt")) for row in rows]
    q_QD, p_PD = encoder.encode(query_texts, max_length=QUERY_LEN), encoder.encode_corpus(texts, max_length=PASSAGE_LEN)
    ndcg, mrr = [], []
    for row, ranking in zip(rows, np.argsort(-(q_QD @ p_PD.T), axis=1, kind="stable"), strict=True):
        relevant = {row["positive"]} if "positive" in row else set(row["pos"])
        hits = [texts[i] in relevant for i in ranking[:10]]
        ndcg.append(
            sum(hit / log2(r + 2) for r, hit in enumerate(hits))
            / sum(1 / log2(r + 2) for r in range(min(10, len(relevant))))
        )
        mrr.append(next((1 / (r + 1) for r, hit in enumerate(hits) if hit), 0.0))
    return {"nDCG@10": float(np.mean(ndcg)), "MRR@10": float(np.mean(mrr))}


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_equals_a_numpy_search(data, tiny_model, tmp_path, small_blocks, monkeypatch, with_corpus):
    monkeypatch.setattr(in_training, "SCORED_QUERIES", 7)
    monkeypatch.setattr(in_training, "MERGED_QUERIES", 11)
    corpus, dev, texts, rows = data
    encoder = Encoder(tiny_model, **INSTRUCTIONS, devices="cpu")
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    assert len(prepared.queries.blocks) > 5
    metrics = RetrievalValidator(prepared, 0, 1).measure(encoder)
    assert metrics == pytest.approx(expected(encoder, texts if with_corpus else pool_of(rows), rows), abs=1e-9)
    assert 0.1 < metrics["MRR@10"] < 0.9
    without = Encoder(tiny_model, devices="cpu")
    assert RetrievalValidator(prepared, 0, 1).measure(without) != metrics  # the instructions have an effect


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_runs_with_a_shared_cache_tokenize_once(data, tiny_model, tmp_path, small_blocks, monkeypatch, with_corpus):
    corpus, dev, _, _ = data
    encoder = Encoder(tiny_model, **INSTRUCTIONS, devices="cpu")
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    expected = RetrievalValidator(prepared, 0, 1).measure(encoder)
    cache = TokenCache(str(tmp_path / "cache"))
    assert RetrievalValidator(prepared, 0, 1, cache).measure(encoder) == expected
    monkeypatch.setattr(Encoder, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert RetrievalValidator(prepared, 0, 1, cache).measure(encoder) == expected


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_equals_raybge_evaluate(ray_cluster, data, tiny_model, tmp_path, with_corpus):
    corpus, _, _, rows = data
    rows = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    dev = write(tmp_path / "dev.jsonl", rows)
    pool = corpus if with_corpus else write(tmp_path / "pool.jsonl", [{"text": text} for text in pool_of(rows)])
    lengths = dict(query_max_len=QUERY_LEN, passage_max_len=PASSAGE_LEN)
    result = evaluate_retrieval(encoder=tiny_model, corpus_data=pool, query_data=dev, num_workers=1, **lengths)
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    metrics = RetrievalValidator(prepared, 0, 1).measure(Encoder(tiny_model, devices="cpu"))
    assert metrics == pytest.approx({name: result.metrics[name] for name in metrics}, abs=5e-5)


def evaluate_twice(prepared, model, rank, world):
    """Metrics of two evaluations, passage ids of all answers, number of model calls, and the examples of the first
    evaluation and of one after the model has changed.
    """
    encoder = Encoder(model, devices="cpu")
    calls = []
    encoder.model.register_forward_hook(lambda *args: calls.append(1))
    validator = RetrievalValidator(prepared, rank, world)
    metrics = [validator.measure(encoder), validator.measure(encoder)]
    number, first = len(calls), validator.last_result
    change_weights(encoder)
    validator.measure(encoder)
    examples = validator.examples(first, validator.last_result)
    return metrics, [ids.tolist() for ids in validator._corpus.answers], number, examples


def change_weights(encoder):
    """Change a model as training may, the same way each time."""
    weight = encoder.model.backbone.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def one_worker(rank, world, folder, data_sets, model):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(
        [evaluate_twice(prepared, model, rank, world) for prepared in data_sets], os.path.join(folder, f"results{rank}")
    )
    torch.distributed.barrier()
    os._exit(0)  # as in the other tests of several processes


def test_results_do_not_depend_on_the_number_of_workers(data, tiny_model, tmp_path, small_blocks, monkeypatch):
    """Metrics are equal bit for bit on every worker, with many query blocks and with two, so that one worker has none.

    So are passage ids and, on worker 0, the examples. All workers call the model equally often.
    """
    corpus, dev, _, _ = data
    world = 3
    many = data_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    monkeypatch.setattr(validation_data, "BLOCK_BYTES", 4096)
    few = data_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    few = ValidationData(few.queries, many.corpus, QUERY_LEN, PASSAGE_LEN)
    assert len(many.corpus.blocks) > 5 < len(many.queries.blocks) and len(few.queries.blocks) == 2
    run_in_processes(one_worker, (world, str(tmp_path), (many, few), tiny_model), world)
    results = [torch.load(tmp_path / f"results{rank}", weights_only=False) for rank in range(world)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number, prepared in enumerate((many, few)):
        (first, second), answers, calls, examples = evaluate_twice(prepared, tiny_model, 0, 1)
        assert first == second
        assert all(each[number][:2] == ([first, first], answers) for each in results)
        assert len({each[number][2] for each in results}) == 1 and results[0][number][2] < calls
        assert len(examples) == 20 and [each[number][3] for each in results] == [examples, [], []]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_examples_equal_a_numpy_search(data, tiny_model, tmp_path, small_blocks, monkeypatch, capsys, with_corpus):
    corpus, dev, texts, rows = data
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    pool = texts if with_corpus else pool_of(rows)
    encoder, validator = Encoder(tiny_model, devices="cpu"), RetrievalValidator(prepared, 0, 1)
    results = []
    for _ in range(2):
        means = validator.measure(encoder)
        assert means == {name: values.mean() for name, values in validator.last_result.values.items()}
        query_texts = [encoder.query_text(row["query"], row.get("prompt")) for row in rows]
        q_QD, p_PD = (
            encoder.encode(query_texts, max_length=QUERY_LEN),
            encoder.encode_corpus(pool, max_length=PASSAGE_LEN),
        )
        results.append((validator.last_result, np.argsort(-(q_QD @ p_PD.T), axis=1, kind="stable")))
        change_weights(encoder)
    (first, before), (last, after) = results
    examples = validator.examples(first, last)
    differences = [each.after - each.before for each in examples]
    all_differences = last.values["nDCG@10"] - first.values["nDCG@10"]
    assert [abs(difference) for difference in differences] == sorted(
        (abs(difference) for difference in differences), reverse=True
    )
    assert (
        max(differences) == all_differences.max() > 0 > all_differences.min() == min(differences)
        and len(examples) == 20
    )
    by_query = {row["query"]: (i, row) for i, row in enumerate(rows)}
    for each in examples:
        i, row = by_query[each.query]
        relevant = {row["positive"]} if "positive" in row else set(row["pos"])
        assert (each.before, each.after) == (first.values["nDCG@10"][i], last.values["nDCG@10"][i])
        assert each.answer == (row.get("positive") or row["pos"][0])
        for hits, rank, ranking in (
            (each.hits_before, each.rank_before, before[i]),
            (each.hits_after, each.rank_after, after[i]),
        ):
            assert [(hit.text, hit.relevant) for hit in hits] == [(pool[j], pool[j] in relevant) for j in ranking[:3]]
            ranks = [k + 1 for k, j in enumerate(ranking[:10]) if pool[j] in relevant]
            assert rank == (ranks[0] if ranks else None)
    monkeypatch.setattr(ValidationData, "passages", lambda *_: 1 / 0)
    without = validator.examples(first, last)  # the run continues
    assert [each.query for each in without] == [each.query for each in examples] and without[0].hits_after[0].text == ""
    monkeypatch.setattr(ValidationData, "groups", lambda *_: 1 / 0)
    assert validator.examples(first, last) == [] and "ZeroDivisionError" in capsys.readouterr().err


def test_ties_are_ordered_by_passage_id():
    """Integer scores have many ties; a complete sort is the reference."""
    rng = np.random.default_rng(0)
    score_QP = torch.from_numpy(rng.integers(0, 6, (40, 90)).astype(np.float32))
    score_QK, id_QK = torch.full((40, 10), -torch.inf), torch.full((40, 10), -1)
    for start in range(0, 90, 9):
        in_training._keep_best(score_QK, id_QK, score_QP[:, start : start + 9], torch.arange(start, start + 9))
    order_QP = np.argsort(-score_QP.numpy(), axis=1, kind="stable")[:, :10]
    assert (id_QK.numpy() == order_QP).all()
    assert (score_QK.numpy() == np.take_along_axis(score_QP.numpy(), order_QP, axis=1)).all()


def test_evaluation_does_not_affect_training(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    encoder = Encoder(tiny_model, devices="cpu")
    encoder.model.train()
    frozen = encoder.model.backbone.embeddings
    frozen.eval()

    def step(with_measure):
        torch.manual_seed(5)
        before = encoder.model.embed([[5, 6, 7]] * 4, 64)
        metrics = RetrievalValidator(prepared, 0, 1).measure(encoder) if with_measure else None
        return before, encoder.model.embed([[5, 6, 7]] * 4, 64), metrics

    (first, without, _), (_, after, metrics), (_, _, again) = step(False), step(True), step(True)
    assert torch.equal(without, after) and after.requires_grad
    assert not torch.equal(first, without)  # dropout is on
    assert metrics == again  # and off in the evaluation
    assert encoder.model.training and encoder.model.backbone.encoder.training and not frozen.training


def test_tokens_in_memory_are_bounded(data, tiny_model, tmp_path, small_blocks, monkeypatch):
    corpus, dev, _, _ = data
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    results = {}
    for max_bytes in (0, 2000, 1 << 20):
        monkeypatch.setattr(in_training, "TOKEN_BYTES", max_bytes)
        encoder = Encoder(tiny_model, devices="cpu")
        validator = RetrievalValidator(prepared, 0, 1)
        first = validator.measure(encoder)
        with mock.patch.object(encoder, "tokenize", wraps=encoder.tokenize) as tokenize:
            assert validator.measure(encoder) == first
        results[max_bytes] = first, sum(len(call.args[0]) for call in tokenize.call_args_list)
        assert validator._corpus.queries.held_bytes + validator._corpus.passages.held_bytes <= max_bytes
    assert results[0][0] == results[2000][0] == results[1 << 20][0]
    assert results[0][1] == 50 + 120 > results[2000][1] > results[1 << 20][1] == 0


def test_vectors_that_are_not_finite_are_an_error(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data
    prepared = data_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    encoder = Encoder(tiny_model, devices="cpu")
    with torch.no_grad():
        encoder.model.backbone.embeddings.word_embeddings.weight[7] = torch.nan
    with pytest.raises(UserError, match="before the first step: the model's vectors contain inf or nan"):
        RetrievalValidator(prepared, 0, 1).measure(encoder)
    with pytest.raises(UserError, match="after step 1,200: .* so training has diverged; lower --learning_rate"):
        RetrievalValidator(prepared, 0, 1).measure(encoder, 1200)


def test_no_data_without_eval_data(tiny_model, tmp_path):
    assert prepare(ValidationSpec.from_options(options_of(tiny_model)), tmp_path) is None
    with pytest.raises(UserError, match="give --eval_data too"):
        ValidationSpec.from_options(options_of(tiny_model, eval_corpus="corpus.jsonl"))


def test_invalid_input_is_reported(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data

    def message(**flags):
        with pytest.raises(UserError) as error:
            prepare(ValidationSpec.from_options(options_of(tiny_model, **flags)), tmp_path)
        return str(error.value)

    assert (
        message(eval_data=str(tmp_path / "none.jsonl")) == f"--eval_data: {tmp_path}/none.jsonl: no such file or folder"
    )
    assert "--eval_corpus" in message(eval_data=dev, eval_corpus=str(tmp_path / "none.jsonl"))
    bad = write(tmp_path / "bad.jsonl", [{"query": "q", "pos": "p"}, {"query": "q", "pos": "p", "neg": [3]}])
    assert 'bad.jsonl:2: "neg" must be' in message(eval_data=bad)
    assert prepare(
        ValidationSpec.from_options(options_of(tiny_model, eval_data=bad, eval_corpus=corpus)), tmp_path
    )  # `neg` is not read
    assert 'bad.jsonl:1: "text" must be' in message(eval_data=dev, eval_corpus=bad)
    prepared = data_of(tiny_model, tmp_path, eval_data=bad, on_bad_rows="skip")
    assert prepared.queries.total_rows == 1
    assert "--eval_data: 1 invalid row skipped" in "\n".join(prepared.lines())


def test_compressed_files(data, tiny_model, tmp_path):
    """Compressed files are decompressed below the storage path, so that their blocks can be shared out."""
    import gzip

    corpus, dev, _, _ = data
    compressed = tmp_path / "dev.jsonl.gz"
    compressed.write_bytes(gzip.compress(Path(dev).read_bytes()))
    encoder = Encoder(tiny_model, devices="cpu")
    metrics = [
        RetrievalValidator(data_of(tiny_model, tmp_path, eval_data=str(path), eval_corpus=corpus), 0, 1).measure(
            encoder
        )
        for path in (dev, compressed)
    ]
    assert metrics[0] == metrics[1]
    assert list((tmp_path / ".raybge" / "data").glob("dev-*.jsonl"))


def test_changed_file_is_reported(data, tiny_model, tmp_path):
    rows = data[-1]
    copy = write(tmp_path / "copy.jsonl", rows)
    prepared = data_of(tiny_model, tmp_path, eval_data=copy)
    write(tmp_path / "copy.jsonl", rows[:-1])
    with pytest.raises(UserError, match=r"copy\.jsonl changed during the run"):
        RetrievalValidator(prepared, 0, 1).measure(Encoder(tiny_model, devices="cpu"))
