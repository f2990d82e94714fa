"""Data sets of a run: joined, dropped, weighted, described."""

import json
from pathlib import Path

import numpy as np
import pytest

from raybge.data.datasets import DataSets, build_data_sets, parse_weights
from raybge.data.groups import parse_group
from raybge.data.order import Order
from raybge.data.source_files import list_files
from raybge.data.survey import Survey, survey
from raybge.util.errors import UserError

SIZES = {"d/big.jsonl": 60, "d/mid.jsonl": 20, "d/one.jsonl": 5, "d/sub/two.jsonl": 4, "tiny.jsonl": 3}


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Survey:
    """Survey of a folder with files of 60, 20, 5 and 4 rows, and of a single file of 3 rows."""
    monkeypatch.chdir(tmp_path)
    write(SIZES)
    return read("d", "tiny.jsonl")


def write(sizes: dict[str, int]) -> None:
    for name, rows in sizes.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps({"query": f"q{i}", "pos": [name]}) + "\n" for i in range(rows)))


def read(*paths: str) -> Survey:
    return survey(list_files(list(paths), "--train_data"), 200, parse_group)


def shown(sets: DataSets) -> dict[str, int]:
    return {one.name: one.rows for one in sets.used}


def epoch(sets: DataSets, counts: Survey) -> list[int]:
    """Return the rows per epoch of each file."""
    order = Order(counts.rows, 4, 0, False, sets.mixture)
    files = [
        counts.blocks[span.block].file
        for window in order.windows(0, 0, 1)
        for lane in window.lanes
        for span in lane.spans
        for _ in span.rows
    ]
    return np.bincount(files, minlength=len(counts.files)).tolist()


def test_each_file_is_a_data_set(counts):
    sets = build_data_sets(counts, 10**8)
    assert shown(sets) == SIZES
    assert sets.dropped == () and sets.alone == frozenset()
    assert sets.mixture.pools == 1
    assert epoch(sets, counts) == [60, 20, 5, 4, 3]


def test_small_files_of_a_folder_are_joined_and_a_named_file_stays(counts):
    sets = build_data_sets(counts, 10**8, small_threshold=10, together=True)
    assert shown(sets) == {"d/big.jsonl": 60, "d/mid.jsonl": 20, "d/ (2 small files)": 9, "tiny.jsonl": 3}
    assert sets.mixture.pool_F.tolist() == [0, 1, 2, 2, 3]
    assert shown(build_data_sets(counts, 10**8, small_threshold=5)) == SIZES  # one small file is joined with nothing


@pytest.mark.parametrize("together", [False, True])
def test_joined_data_sets_below_the_threshold_are_dropped(counts, together):
    sets = build_data_sets(counts, 10**8, small_threshold=10, drop_threshold=10, together=together)
    assert shown(sets) == {"d/big.jsonl": 60, "d/mid.jsonl": 20, "tiny.jsonl": 3}
    assert [one.name for one in sets.dropped] == ["d/ (2 small files)"]
    assert epoch(sets, counts) == [60, 20, 0, 0, 3]
    assert build_data_sets(counts, 10**8, small_threshold=10, drop_threshold=9).dropped == ()
    assert build_data_sets(counts, 10**8, small_threshold=0, drop_threshold=10).dropped == ()


def test_dropping_all_data_sets_is_an_error(counts):
    with pytest.raises(UserError, match=r"--drop_threshold 100 drops all .* d/ \(4 small files\) \(89 rows\)"):
        build_data_sets(read("d"), 10**8, small_threshold=90, drop_threshold=100)


def test_files_of_different_folders_are_not_joined(counts):
    write({"e/x.jsonl": 2, "e/y.jsonl": 2})
    sets = build_data_sets(read("d", "e/"), 10**8, small_threshold=10)
    assert list(shown(sets)) == ["d/big.jsonl", "d/mid.jsonl", "d/ (2 small files)", "e/ (2 small files)"]


def test_a_file_has_at_most_max_examples_rows(counts):
    sets = build_data_sets(counts, 10)
    assert shown(sets) == {
        "d/big.jsonl": 10,
        "d/mid.jsonl": 10,
        "d/one.jsonl": 5,
        "d/sub/two.jsonl": 4,
        "tiny.jsonl": 3,
    }
    assert epoch(sets, counts) == [10, 10, 5, 4, 3]
    # rows that are used are what is held against the thresholds
    assert len(build_data_sets(counts, 10, small_threshold=11).used) == 2


def test_weights_by_file_and_by_folder(counts):
    sets = build_data_sets(counts, 10**8, weights={"d": 2.5, "d/big.jsonl": 0.5})
    assert epoch(sets, counts) == [30, 50, 13, 10, 3]  # 5 * 2.5 rounds up
    assert epoch(build_data_sets(counts, 10**8, weights={"d/": 2, "tiny.jsonl": 3}), counts) == [120, 40, 10, 8, 9]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("big.jsonl", "; did you mean d/big.jsonl?"),
        ("d/bgi.jsonl", "; did you mean d/big.jsonl?"),
        ("tinny.jsonl", "; did you mean tiny.jsonl?"),
        ("elsewhere", ""),
    ],
)
def test_a_weight_of_an_unknown_data_set_is_refused(counts, name, hint):
    with pytest.raises(UserError) as caught:
        build_data_sets(counts, 10**8, weights={name: 2.0})
    assert str(caught.value) == f"--dataset_weights: --train_data has no {name}{hint}"


def test_weights_are_parsed():
    assert parse_weights(["a.jsonl=2", "s3://b/c?x=y=0.5", "d = e=1e1"]) == {
        "a.jsonl": 2.0,
        "s3://b/c?x=y": 0.5,
        "d = e": 10.0,
    }
    for wrong in ("a.jsonl", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=101", "a=x"):
        with pytest.raises(UserError, match=f"--dataset_weights {wrong}: expected NAME=WEIGHT"):
            parse_weights(["b=1", wrong])
    with pytest.raises(UserError, match="names a twice"):
        parse_weights(["a=1", "a=2"])


def test_names_that_disable_in_batch_negatives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["d/a_no_in_batch_neg.jsonl", "d/no_in_batch_neg_b.jsonl", "e_no_in_batch_neg/c.jsonl", "f/d.jsonl"]
    write(dict.fromkeys([*names, "e_no_in_batch_neg/deep/g.jsonl"], 2))
    assert build_data_sets(read("d", "e_no_in_batch_neg/", "f"), 10**8).alone == {0, 2, 3}
    assert build_data_sets(read("e_no_in_batch_neg/c.jsonl", "f/d.jsonl"), 10**8).alone == {0}


def test_description(counts):
    order = Order(counts.rows, 8, 0)
    assert build_data_sets(read("tiny.jsonl"), 10**8).describe(read("tiny.jsonl"), Order([3], 1, 0)) == []
    assert build_data_sets(counts, 10**8).describe(counts, order) == [
        f"  {name}: {rows} groups" for name, rows in SIZES.items()
    ]
    sets = build_data_sets(counts, 30, 10, 10, {"d": 2}, together=True)
    order = Order(counts.rows, 8, 0, True, sets.mixture)
    assert sets.describe(counts, order) == [
        "  d/big.jsonl: 30 groups; 30 of 60 rows; 60 per epoch",
        "  d/mid.jsonl: 20 groups; 40 per epoch",
        "  tiny.jsonl: 3 groups; dropped by --dataloader_drop_last: less than a global batch of 8",
        "  dropped by --drop_threshold: d/ (2 small files): 9 groups",
    ]
    write({"x_no_in_batch_neg.jsonl": 2})
    alone = read("x_no_in_batch_neg.jsonl")
    assert build_data_sets(alone, 10**8).describe(alone, Order([2], 2, 0)) == [
        "  x_no_in_batch_neg.jsonl: 2 groups; own negatives only"
    ]
