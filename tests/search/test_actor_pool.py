"""The path of actors with a GPU, run on CPUs: tasks tokenize ahead, several blocks are in progress in an actor.

The files are, byte by byte, those of actors that tokenize by themselves, one block after the other.
"""

import json
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from raybge import encode_dataset, mine_hard_negatives
from raybge.cluster.resources import Plan
from raybge.encoding import ray_dataset
from raybge.encoding import run as encoding_run
from raybge.mining import run as mining_run
from raybge.model.spec import EncoderSpec
from raybge.search import actor_pool, inputs
from raybge.search.actor_pool import blocks_in_progress, map_on_actors, tokens_column, tokens_of
from raybge.search.embedder import make_embedder


@pytest.fixture
def as_on_gpus(monkeypatch):
    """as_on_gpus(): from then on actors work as with GPUs."""

    def switch() -> None:
        for module in (encoding_run, mining_run, ray_dataset):
            monkeypatch.setattr(module, "make_embedder", lambda m, plan: replace(make_embedder(m, plan), tokenized=m))
        monkeypatch.setattr(actor_pool, "blocks_in_progress", lambda plan: 4)

    return switch


@pytest.fixture
def groups(tmp_path, words, monkeypatch):
    """Write groups and a pool of many small blocks; a row with a prompt of its own, a repeated text."""
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 1500)
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(240)]
    rows = [{"query": " ".join(rng.choice(words, 3)), "pos": [texts[i], f"{texts[i]} ak"]} for i in range(60)]
    rows[3]["prompt"], texts[9] = "bk", texts[2]
    for name, lines in (("groups.jsonl", rows), ("pool.jsonl", [{"text": text} for text in texts])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_encoded_files_are_the_same(ray_cluster, groups, tiny_model, as_on_gpus, kind):
    def encoded(name: str, workers: int) -> bytes:
        path = groups / f"{name}.npy"
        flags = {f"{kind}_instruction_for_retrieval": "al ", "kind": kind, "num_workers": workers}
        encode_dataset(
            model_name_or_path=tiny_model, input_file=str(groups / "pool.jsonl"), output_file=str(path), **flags
        )
        return path.read_bytes()

    expected = encoded("plain", 1)
    as_on_gpus()
    assert encoded("one", 1) == expected and encoded("three", 3) == expected


def test_mined_files_are_the_same(ray_cluster, groups, tiny_model, as_on_gpus):
    """The positives of the queries are encoded too: they are not in the pool."""

    def mined(name: str, workers: int) -> bytes:
        path = groups / f"{name}.jsonl"
        mine_hard_negatives(
            model_name_or_path=tiny_model,
            input_file=str(groups / "groups.jsonl"),
            corpus_data=str(groups / "pool.jsonl"),
            output_file=str(path),
            range_for_sampling="0-20",
            negative_number=4,
            keep_scores=True,
            query_instruction_for_retrieval="am",
            query_instruction_format="{} {}",
            num_workers=workers,
        )
        return path.read_bytes()

    expected = mined("plain", 1)
    assert b"pos_scores" in expected
    as_on_gpus()
    assert mined("one", 1) == expected and mined("three", 3) == expected


def test_a_dataset_gets_the_same_column(ray_cluster, words, tiny_model, as_on_gpus):
    def column() -> list[dict]:
        dataset = ray_cluster.data.from_items([{"text": word} for word in words], override_num_blocks=3)
        encoded = encode_dataset(dataset, model_name_or_path=tiny_model, num_workers=2)
        return sorted(encoded.take_all(), key=lambda row: row["text"])

    expected = column()
    as_on_gpus()
    found = column()
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    np.testing.assert_array_equal([r["embedding"] for r in found], [r["embedding"] for r in expected])


class Meeting:
    """Actor whose first two calls return once both have begun."""

    def __init__(self) -> None:
        self.begun = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun += 1
        deadline = time.monotonic() + 60
        while self.begun < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return pa.table({"together": [self.begun >= 2]})


def test_blocks_are_in_progress_at_the_same_time(ray_cluster, as_on_gpus):
    """One block is written while the model encodes another one."""
    assert blocks_in_progress(Plan(1, 1, 0)) == 1 and blocks_in_progress(Plan(1, 1, 1)) == 4
    as_on_gpus()
    dataset = ray_cluster.data.range(2, override_num_blocks=2)
    rows = map_on_actors(dataset, Meeting, (), Plan(1, 1, 0), 2).take_all()
    assert [row["together"] for row in rows] == [True, True]


def test_only_actors_with_a_gpu_have_tokens_made_ahead(tiny_model):
    model = EncoderSpec(tiny_model)
    assert (
        make_embedder(model, Plan(1, 5, 1)).tokenized == model and make_embedder(model, Plan(1, 5, 0)).tokenized is None
    )


@pytest.mark.parametrize("texts", [[], [[]], [[3, 4], [], [5]]], ids=["none", "empty", "several"])
def test_tokens_survive_their_column(texts):
    lengths = np.array([len(ids) for ids in texts], np.int32)
    column = tokens_column(lengths, np.array([i for ids in texts for i in ids], np.int32))
    table = pa.concat_tables(
        [pa.table({"tokens": tokens_column(np.ones(2, np.int32), np.ones(2, np.int32))}), pa.table({"tokens": column})]
    )
    assert [ids.tolist() for ids in tokens_of(table.slice(2)["tokens"])] == texts
