"""Evaluation while training: against a plain search, against `raybge.evaluate`, and one process against several."""

import itertools
import json
import os
from math import log2
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from raybge import evaluate_retrieval
from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.data.token_cache import TokenCache
from raybge.evaluation import eval_data as validation_data
from raybge.evaluation import in_training as validation
from raybge.evaluation.spec import ValidationSpec
from raybge.evaluation.validation_data import ValidationData, prepare
from raybge.evaluation.in_training import RetrievalValidator
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

QUERY_LEN, PASSAGE_LEN = 8, 9
INSTRUCTIONS = dict(query_instruction_for_retrieval="ak ", passage_instruction_for_retrieval="bl ")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """(corpus, dev, texts, rows): a corpus with duplicates, and queries with prompts, several or missing answers."""
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


def arguments(tiny_model, **flags):
    given = dict(model_name_or_path=tiny_model, train_data="none.jsonl", output_dir="none", query_max_len=QUERY_LEN)
    return build_options(TrainOptions, {**given, "passage_max_len": PASSAGE_LEN, **flags})


def config_of(tiny_model, storage, **flags) -> ValidationData:
    config = prepare(ValidationSpec.from_options(arguments(tiny_model, **flags)), storage)
    assert config is not None
    return config


def pool_of(rows):
    """Every `pos` and `neg`, in the order of their first appearance."""
    listed = [[row["positive"]] if "positive" in row else row["pos"] + row.get("neg", []) for row in rows]
    return list(dict.fromkeys(itertools.chain.from_iterable(listed)))


def expected(encoder, texts, rows):
    """The metrics of a search over everything at once."""
    asked = [encoder.query_text(row["query"], row.get("prompt")) for row in rows]
    q_QD, p_PD = encoder.encode(asked, max_length=QUERY_LEN), encoder.encode_corpus(texts, max_length=PASSAGE_LEN)
    ndcg, mrr = [], []
    for row, ranking in zip(rows, np.argsort(-(q_QD @ p_PD.T), axis=1, kind="stable"), strict=True):
        wanted = {row["positive"]} if "positive" in row else set(row["pos"])
        hits = [texts[i] in wanted for i in ranking[:10]]
        ndcg.append(
            sum(hit / log2(r + 2) for r, hit in enumerate(hits))
            / sum(1 / log2(r + 2) for r in range(min(10, len(wanted))))
        )
        mrr.append(next((1 / (r + 1) for r, hit in enumerate(hits) if hit), 0.0))
    return {"nDCG@10": float(np.mean(ndcg)), "MRR@10": float(np.mean(mrr))}


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_equals_a_plain_search(data, tiny_model, tmp_path, small_blocks, monkeypatch, with_corpus):
    monkeypatch.setattr(validation, "SCORED", 7)
    monkeypatch.setattr(validation, "MERGED", 11)
    corpus, dev, texts, rows = data
    encoder = Encoder(tiny_model, **INSTRUCTIONS, devices="cpu")
    config = config_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    assert len(config.queries.blocks) > 5
    found = RetrievalValidator(config, 0, 1).measure(encoder)
    assert found == pytest.approx(expected(encoder, texts if with_corpus else pool_of(rows), rows), abs=1e-9)
    assert 0.1 < found["MRR@10"] < 0.9
    plain = Encoder(tiny_model, devices="cpu")
    assert RetrievalValidator(config, 0, 1).measure(plain) != found  # the instructions act


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_runs_that_share_their_tokens_tokenise_once(data, tiny_model, tmp_path, small_blocks, monkeypatch, with_corpus):
    corpus, dev, _, _ = data
    encoder = Encoder(tiny_model, **INSTRUCTIONS, devices="cpu")
    config = config_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    expected = RetrievalValidator(config, 0, 1).measure(encoder)
    kept = TokenCache(str(tmp_path / "kept"))
    assert RetrievalValidator(config, 0, 1, kept).measure(encoder) == expected
    monkeypatch.setattr(Encoder, "tokenize", lambda *_: pytest.fail("tokenised again"))
    assert RetrievalValidator(config, 0, 1, kept).measure(encoder) == expected


@pytest.fixture(scope="module")
def ray_of_four():
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_equals_raybge_evaluate(ray_of_four, data, tiny_model, tmp_path, with_corpus):
    corpus, _, _, rows = data
    rows = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    dev = write(tmp_path / "dev.jsonl", rows)
    pool = corpus if with_corpus else write(tmp_path / "pool.jsonl", [{"text": text} for text in pool_of(rows)])
    lengths = dict(query_max_len=QUERY_LEN, passage_max_len=PASSAGE_LEN)
    theirs = evaluate_retrieval(encoder=tiny_model, corpus_data=pool, query_data=dev, num_workers=1, **lengths)
    config = config_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    ours = RetrievalValidator(config, 0, 1).measure(Encoder(tiny_model, devices="cpu"))
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=5e-5)


def measured(config, model, rank, world):
    """Metrics of a first and a second evaluation; the passage ids of all answers; how often the model ran; what is
    shown of the first and of one after the model has changed.
    """
    encoder = Encoder(model, devices="cpu")
    calls = []
    encoder.model.register_forward_hook(lambda *given: calls.append(1))
    watched = RetrievalValidator(config, rank, world)
    found = [watched.measure(encoder), watched.measure(encoder)]
    number, first = len(calls), watched.last_result
    change(encoder)
    watched.measure(encoder)
    shown = watched.examples(first, watched.last_result)
    return found, [ids.tolist() for ids in watched._task.answers], number, shown


def change(encoder):
    """What training may do to a model, the same each time."""
    weight = encoder.model.backbone.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def one_worker(rank, world, folder, configs, model):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save([measured(config, model, rank, world) for config in configs], os.path.join(folder, f"found{rank}"))
    torch.distributed.barrier()
    os._exit(0)  # as in the other tests of several processes


def test_any_number_of_workers_gives_the_same_numbers(data, tiny_model, tmp_path, small_blocks, monkeypatch):
    """Bit for bit, on every worker, with many blocks of queries and with two, of which one worker of three has none.
    What is shown of the queries too, on worker 0.

    Passages are numbered alike too, and all workers call the model equally often.
    """
    corpus, dev, _, _ = data
    world = 3
    many = config_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    monkeypatch.setattr(validation_data, "BLOCK_BYTES", 4096)
    few = config_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    few = ValidationData(few.queries, many.corpus, QUERY_LEN, PASSAGE_LEN)
    assert len(many.corpus.blocks) > 5 < len(many.queries.blocks) and len(few.queries.blocks) == 2
    mp.spawn(one_worker, (world, str(tmp_path), (many, few), tiny_model), nprocs=world)
    found = [torch.load(tmp_path / f"found{rank}", weights_only=False) for rank in range(world)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number, config in enumerate((many, few)):
        (first, second), answers, calls, shown = measured(config, tiny_model, 0, 1)
        assert first == second
        assert all(each[number][:2] == ([first, first], answers) for each in found)
        assert len({each[number][2] for each in found}) == 1 and found[0][number][2] < calls
        assert len(shown) == 20 and [each[number][3] for each in found] == [shown, [], []]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "own pool"])
def test_what_is_shown_is_what_a_search_finds(
    data, tiny_model, tmp_path, small_blocks, monkeypatch, capsys, with_corpus
):
    corpus, dev, texts, rows = data
    config = config_of(tiny_model, tmp_path, eval_data=dev, **({"eval_corpus": corpus} if with_corpus else {}))
    pool = texts if with_corpus else pool_of(rows)
    encoder, watched = Encoder(tiny_model, devices="cpu"), RetrievalValidator(config, 0, 1)
    found = []
    for _ in range(2):
        means = watched.measure(encoder)
        assert means == {name: values.mean() for name, values in watched.last_result.values.items()}
        asked = [encoder.query_text(row["query"], row.get("prompt")) for row in rows]
        q_QD, p_PD = encoder.encode(asked, max_length=QUERY_LEN), encoder.encode_corpus(pool, max_length=PASSAGE_LEN)
        found.append((watched.last_result, np.argsort(-(q_QD @ p_PD.T), axis=1, kind="stable")))
        change(encoder)
    (first, before), (last, after) = found
    shown = watched.examples(first, last)
    gaps = [each.after - each.before for each in shown]
    every = last.values["nDCG@10"] - first.values["nDCG@10"]
    assert [abs(gap) for gap in gaps] == sorted((abs(gap) for gap in gaps), reverse=True)
    assert max(gaps) == every.max() > 0 > every.min() == min(gaps) and len(shown) == 20
    by_query = {row["query"]: (i, row) for i, row in enumerate(rows)}
    for each in shown:
        i, row = by_query[each.query]
        right = {row["positive"]} if "positive" in row else set(row["pos"])
        assert (each.before, each.after) == (first.values["nDCG@10"][i], last.values["nDCG@10"][i])
        assert each.answer == (row.get("positive") or row["pos"][0])
        for hits, rank, ranking in (
            (each.hits_before, each.rank_before, before[i]),
            (each.hits_after, each.rank_after, after[i]),
        ):
            assert [(hit.text, hit.right) for hit in hits] == [(pool[j], pool[j] in right) for j in ranking[:3]]
            ranks = [k + 1 for k, j in enumerate(ranking[:10]) if pool[j] in right]
            assert rank == (ranks[0] if ranks else None)
    monkeypatch.setattr(ValidationData, "passages", lambda *_: 1 / 0)
    without = watched.examples(first, last)  # and the run goes on
    assert [each.query for each in without] == [each.query for each in shown] and without[0].hits_after[0].text == ""
    monkeypatch.setattr(ValidationData, "groups", lambda *_: 1 / 0)
    assert watched.examples(first, last) == [] and "ZeroDivisionError" in capsys.readouterr().err


def test_ties_go_by_passage_id():
    """Whole numbers as scores tie often; a full sort is the reference."""
    rng = np.random.default_rng(0)
    score_QP = torch.from_numpy(rng.integers(0, 6, (40, 90)).astype(np.float32))
    score_QK, id_QK = torch.full((40, 10), -torch.inf), torch.full((40, 10), -1)
    for start in range(0, 90, 9):
        validation._keep_best(score_QK, id_QK, score_QP[:, start : start + 9], torch.arange(start, start + 9))
    order_QP = np.argsort(-score_QP.numpy(), axis=1, kind="stable")[:, :10]
    assert (id_QK.numpy() == order_QP).all()
    assert (score_QK.numpy() == np.take_along_axis(score_QP.numpy(), order_QP, axis=1)).all()


def test_training_goes_on_as_if_nothing_had_been_measured(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data
    config = config_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    encoder = Encoder(tiny_model, devices="cpu")
    encoder.model.train()
    frozen = encoder.model.backbone.embeddings
    frozen.eval()

    def step(with_measure):
        torch.manual_seed(5)
        before = encoder.model.embed([[5, 6, 7]] * 4, 64)
        found = RetrievalValidator(config, 0, 1).measure(encoder) if with_measure else None
        return before, encoder.model.embed([[5, 6, 7]] * 4, 64), found

    (first, plain, _), (_, after, found), (_, _, again) = step(False), step(True), step(True)
    assert torch.equal(plain, after) and after.requires_grad
    assert not torch.equal(first, plain)  # dropout is on
    assert found == again  # and off while measuring
    assert encoder.model.training and encoder.model.backbone.encoder.training and not frozen.training


def test_tokens_are_held_within_bounds(data, tiny_model, tmp_path, small_blocks, monkeypatch):
    corpus, dev, _, _ = data
    config = config_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    found = {}
    for room in (0, 2000, 1 << 20):
        monkeypatch.setattr(validation, "HELD_BYTES", room)
        encoder = Encoder(tiny_model, devices="cpu")
        watched = RetrievalValidator(config, 0, 1)
        first = watched.measure(encoder)
        with mock.patch.object(encoder, "tokenize", wraps=encoder.tokenize) as tokenize:
            assert watched.measure(encoder) == first
        found[room] = first, sum(len(call.args[0]) for call in tokenize.call_args_list)
        assert watched._task.queries.held_bytes + watched._task.corpus.held_bytes <= room
    assert found[0][0] == found[2000][0] == found[1 << 20][0]
    assert found[0][1] == 50 + 120 > found[2000][1] > found[1 << 20][1] == 0


def test_vectors_that_are_no_numbers_are_said(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data
    config = config_of(tiny_model, tmp_path, eval_data=dev, eval_corpus=corpus)
    encoder = Encoder(tiny_model, devices="cpu")
    with torch.no_grad():
        encoder.model.backbone.embeddings.word_embeddings.weight[7] = torch.nan
    with pytest.raises(UserError, match="vectors with inf or nan"):
        RetrievalValidator(config, 0, 1).measure(encoder)


def test_nothing_without_eval_data(tiny_model, tmp_path):
    assert prepare(ValidationSpec.from_options(arguments(tiny_model)), tmp_path) is None
    with pytest.raises(UserError, match="give --eval_data too"):
        ValidationSpec.from_options(arguments(tiny_model, eval_corpus="corpus.jsonl"))


def test_bad_input_is_named(data, tiny_model, tmp_path):
    corpus, dev, _, _ = data

    def said(**flags):
        with pytest.raises(UserError) as error:
            prepare(ValidationSpec.from_options(arguments(tiny_model, **flags)), tmp_path)
        return str(error.value)

    assert said(eval_data=str(tmp_path / "none.jsonl")) == f"--eval_data: {tmp_path}/none.jsonl is not there"
    assert "--eval_corpus" in said(eval_data=dev, eval_corpus=str(tmp_path / "none.jsonl"))
    bad = write(tmp_path / "bad.jsonl", [{"query": "q", "pos": "p"}, {"query": "q", "pos": "p", "neg": [3]}])
    assert 'bad.jsonl:2: "neg" must be' in said(eval_data=bad)
    assert prepare(ValidationSpec.from_options(arguments(tiny_model, eval_data=bad, eval_corpus=corpus)), tmp_path)  # `neg` is of no use then
    assert 'bad.jsonl:1: "text" must be' in said(eval_data=dev, eval_corpus=bad)
    config = config_of(tiny_model, tmp_path, eval_data=bad, on_bad_rows="skip")
    assert config.queries.total_rows == 1
    assert "--eval_data: 1 rows are left out" in "\n".join(config.lines())


def test_files_of_every_kind(data, tiny_model, tmp_path):
    """Packed files are written out plain under the storage path, so that their blocks can be shared out."""
    import gzip

    corpus, dev, _, _ = data
    packed = tmp_path / "dev.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(dev).read_bytes()))
    encoder = Encoder(tiny_model, devices="cpu")
    found = [
        RetrievalValidator(config_of(tiny_model, tmp_path, eval_data=str(path), eval_corpus=corpus), 0, 1).measure(encoder)
        for path in (dev, packed)
    ]
    assert found[0] == found[1]
    assert list((tmp_path / ".raybge" / "data").glob("dev-*.jsonl"))


def test_a_file_that_changed_is_named(data, tiny_model, tmp_path):
    rows = data[-1]
    copy = write(tmp_path / "copy.jsonl", rows)
    config = config_of(tiny_model, tmp_path, eval_data=copy)
    write(tmp_path / "copy.jsonl", rows[:-1])
    with pytest.raises(UserError, match=r"copy\.jsonl changed while it was in use"):
        RetrievalValidator(config, 0, 1).measure(Encoder(tiny_model, devices="cpu"))
