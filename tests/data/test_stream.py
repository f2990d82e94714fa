"""Reading tasks without Ray: they read the rows of the order, each once."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tokenizer

from raybge.data import stream as stream_module
from raybge.data.collate import GroupTokenizer, unpack
from raybge.data.groups import parse_group, parse_scored_group
from raybge.data.mixture import Mixture
from raybge.data.order import Order
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files, open_stream
from raybge.data.step_batch import StepBatch
from raybge.data.stream import StepReader, StepStream
from raybge.data.survey import survey
from raybge.data.token_cache import TokenCache
from raybge.data.tokenize import TextTokenizer
from raybge.util.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return two files; the second has an invalid row and a blank line."""
    lines = [json.dumps({"query": f"q {i}", "pos": [f"p {i}", "row"], "extra": "x" * 50}) for i in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:60]) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[60:70], "", "not json", *lines[70:]]) + "\n")
    return tmp_path


def reading(data: Path, order=None, scored: bool = False, global_batch: int = 8) -> StepReader:
    parse = parse_scored_group if scored else parse_group
    offsets = survey(list_files(str(data), "--f"), 1000, parse, "skip")
    order = Order(offsets.rows, global_batch, 0, mixture=order and order(offsets), window_rows=24)
    texts = TextTokenizer(tokenizer("bert"), Instructions(), 8, 8)
    return StepReader.of(offsets, order, GroupTokenizer(texts, 2, 0, scored=scored))


def steps(read: StepReader, epoch: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> list[StepBatch]:
    windows = read.order.windows(epoch, rank, world, start)
    return [unpack(table) for window in windows for table in read.steps(epoch, window, start)]


def test_every_row_is_read_once_for_any_number_of_workers(data):
    alone = steps(reading(data))
    rows = [row for step in alone for row in step.rows]
    offsets = [(0, at) for at in offsets_of(data / "a.jsonl")] + [(1, at) for at in offsets_of(data / "b.jsonl")]
    assert sorted(rows) == offsets
    assert [step.step for step in alone] == list(range(12))
    shares = [steps(reading(data), rank=rank, world=3) for rank in range(3)]
    assert [[row for share in step for row in share.rows] for step in zip(*shares, strict=True)] == [
        step.rows for step in alone
    ]
    assert [step.rows for step in steps(reading(data), start=5)] == [step.rows for step in alone[5:]]


@pytest.mark.parametrize(("rank", "world", "start"), [(0, 1, 0), (1, 3, 0), (2, 3, 5)], ids=str)
def test_reading_in_process_gives_the_steps_of_each_window(data, rank, world, start):
    read = reading(data)
    assert len(list(read.order.window_bounds(start))) > 1
    batches = [item["batch"] for item in stream_of(data, rank, world, start)]
    expected = steps(read, 0, rank, world, start)
    assert [(b.step, b.rows) for b in batches] == [(b.step, b.rows) for b in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert [ids.tolist() for ids in batch.token_ids] == [ids.tolist() for ids in other.token_ids]


def test_reading_in_process_is_a_few_steps_ahead_and_ends_with_its_reader(data):
    stream = stream_of(data)
    made = []

    class CountingTokenizer(GroupTokenizer):
        def __call__(self, epoch, step, *args):
            made.append(step)
            return super().__call__(epoch, step, *args)

    stream.tokenizer = CountingTokenizer(stream.tokenizer.texts, 2, 0)
    tables = stream_module.read_in_process(stream)
    next(tables)
    tables.close()
    assert made == list(range(len(made)))
    assert 1 <= len(made) <= 1 + stream_module.PREFETCHED_STEPS < len(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_reading_in_process_leaves_the_tokenizer_to_other_threads(data):
    """A tokenizer keeps the truncation of its last call: an evaluation between two steps would change them."""
    stream, used = stream_of(data), []

    class RecordingTokenizer(GroupTokenizer):
        def __call__(self, *args):
            used.append(self.texts.tokenizer)
            return super().__call__(*args)

    stream.tokenizer = RecordingTokenizer(stream.tokenizer.texts, 2, 0)
    assert len(list(stream)) == len(used) == len(stream)
    assert all(each is used[0] and each is not stream.tokenizer.texts.tokenizer for each in used)


def test_reading_in_process_raises_the_error_of_its_thread(data):
    stream = stream_of(data)
    (data / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a\.jsonl changed during the run"):
        list(stream)


def stream_of(data: Path, rank: int = 0, world: int = 1, start: int = 0) -> StepStream:
    offsets = survey(list_files(str(data), "--f"), 1000, parse_group, "skip")
    read = reading(data)
    return StepStream(
        *(offsets, read.order, read.tokenizer, rank, world, 1),
        start_step=start,
        read_tables=stream_module.read_in_process,
    )


def offsets_of(path: Path) -> list[int]:
    offsets, at = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.startswith(b"{"):
            offsets.append(at)
        at += len(line)
    return offsets


def test_runs_with_a_token_cache_read_the_files_once(data, tmp_path_factory, monkeypatch):
    """Other workers, epochs and first steps have other tokens."""
    cache = TokenCache(str(tmp_path_factory.mktemp("cache")))
    read = reading(data)
    cases = [(0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 3, 0), (0, 0, 3, 0), (0, 0, 1, 5)]

    def batches(cache, epoch, rank, world, start):
        monkeypatch.setattr(stream_module, "_opened", lambda *_: replace(read, token_cache=cache))
        starts = [max(first, start) for first, _ in read.order.window_bounds(start)]
        tables = [t for at in starts for t in stream_module._read_shared(b"", epoch, rank, world, at)]
        return [(b.step, b.rows, [ids.tolist() for ids in b.token_ids]) for b in map(unpack, tables)]

    expected = [batches(None, *case) for case in cases]
    assert [batches(cache, *case) for case in cases] == expected
    for name in ("a.jsonl", "b.jsonl"):
        (data / name).unlink()
    assert [batches(cache, *case) for case in cases] == expected
    assert len({str(each) for each in expected}) == len(cases)


def test_tokens_are_those_of_the_row_in_the_file(data):
    read = reading(data)
    texts = [(data / name).read_bytes() for name in ("a.jsonl", "b.jsonl")]
    for batch in steps(read):
        for at, (file, offset) in enumerate(batch.rows):
            raw = json.loads(texts[file][offset:].split(b"\n")[0])
            wanted = read.tokenizer.texts.tokenizer(raw["query"])["input_ids"]
            assert batch.token_ids[at].tolist() == wanted
            assert batch.groups.known_B[at] == 2


def test_repeated_rows_sample_other_passages(data):
    def twice(offsets):
        file_B = np.array([block.file for block in offsets.blocks])
        return Mixture(file_B, np.array([60, 30]), np.array([1.0, 20.0]), np.zeros(2, int))

    read = reading(data, twice)
    drawn: dict[tuple[int, int], list[int]] = {}
    for batch in steps(read):
        for row, key in zip(batch.rows, batch.groups.passage_key_M, strict=True):
            drawn.setdefault(row, []).append(int(key))
    assert {file: {len(keys) for row, keys in drawn.items() if row[0] == file} for file in (0, 1)} == {0: {1}, 1: {20}}
    # one of two positives, 20 times: all the same happens once in 500,000 rows
    assert all(len(set(keys)) == 2 for row, keys in drawn.items() if row[0] == 1)


def test_a_window_opens_a_file_once_and_reads_a_block_once(data, monkeypatch):
    opened, blocks = [], []
    monkeypatch.setattr(stream_module, "open_stream", lambda file: opened.append(file.name) or open_stream(file))
    read_rows = stream_module.read_rows
    monkeypatch.setattr(
        stream_module, "read_rows", lambda stream, block, *rest: blocks.append(block) or read_rows(stream, block, *rest)
    )
    read = reading(data)
    for window in read.order.windows(0, 0, 1):
        opened.clear(), blocks.clear()
        list(read.steps(0, window))
        assert len(opened) <= 2
        assert len(blocks) == len(set(blocks)) > 0


def test_files_that_change_while_they_are_used_are_named(data):
    read = reading(data)
    (data / "a.jsonl").write_text((data / "a.jsonl").read_text()[:-300])
    with pytest.raises(UserError, match=r"a.jsonl changed during the run"):
        steps(read)


def test_batches_have_teacher_scores(data):
    lines = [json.dumps({"query": "q", "pos": ["p"], "pos_scores": [i / 4]}) for i in range(20)]
    (data / "a.jsonl").write_text("\n".join(lines) + "\n")
    (data / "b.jsonl").unlink()
    batches = steps(reading(data, scored=True))
    assert sorted(score for batch in batches for score in batch.groups.teacher_score_M.tolist()) == [
        i / 4 for i in range(20)
    ]


def test_tasks_share_arrays(data):
    """A million blocks are not unpickled by every task."""
    read = reading(data)
    assert read.blocks_B3.shape == (len(read.order.rows), 3)
    assert read.all_good_B.tolist().count(False) == 1  # the block with the bad row
