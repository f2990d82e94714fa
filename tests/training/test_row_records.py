"""Row records as workers write them, and the check of epochs that reads them; without Ray and without training."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from raybge.data.datasets import build_data_sets
from raybge.data.groups import parse_passage
from raybge.data.order import Order
from raybge.data.source_files import list_files
from raybge.data.stream import StepReader
from raybge.data.survey import Survey, survey
from raybge.training.row_records import FOLDER, RowLog, epochs, main, steps
from raybge.util.errors import UserError

SIZES = {"large": 37, "small": 10}


@pytest.fixture(scope="module")
def rows_survey(tmp_path_factory) -> Survey:
    folder = tmp_path_factory.mktemp("data")
    for name, size in SIZES.items():
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(size)))
    return survey(list_files(str(folder), "--train_data"), 64, parse_passage)


def order_of(rows_survey: Survey, drop_last: bool = False, **mixture) -> Order:
    sets = build_data_sets(rows_survey, **{"max_examples": 1000, **mixture})
    return Order(rows_survey.rows, 6, 1, drop_last, sets.mixture)


class RowPositions:
    """Tokenizer that returns the positions of the rows."""

    parse = staticmethod(parse_passage)

    def __call__(self, epoch, step, rows, copies):
        return [(row.file, row.offset) for row in rows]


def train(
    rows_survey: Survey, order: Order, output: Path, first: int, last: int, workers: int, every: int = 1
) -> RowLog:
    """Write the records of workers that train updates (first, last], each of `every` steps."""
    log = RowLog.of(output, rows_survey, order).begin(first, workers)
    updates = -(-order.steps // every)
    for rank in range(workers):
        lines = log.writer(rank)
        for epoch in range(last // updates + 1):
            for window in order.windows(epoch, rank, workers):
                shares = StepReader.of(rows_survey, order, RowPositions()).steps(epoch, window)
                for step, rows in enumerate(shares, start=window.first_step):
                    update = epoch * updates + step // every + 1
                    if first < update <= last:
                        lines.write(epoch, step, update, rows)
    return log


def sorted_steps(output: Path) -> list[tuple[int, int, list]]:
    return [(step.epoch, step.step, sorted(step.rows)) for step in steps(output)]


def test_an_attempt_replaces_later_updates_of_earlier_ones(rows_survey, tmp_path):
    """Attempts with 2, 3 and 1 workers; in the first a worker is killed while it writes, the third goes back."""
    order = order_of(rows_survey)
    log = train(rows_survey, order, tmp_path, 0, 6, workers=2)
    incomplete = tmp_path / FOLDER / f"{log.number}-1.jsonl"
    incomplete.write_text(incomplete.read_text()[:-9])
    train(rows_survey, order, tmp_path, 4, 8, workers=3)
    (tmp_path / FOLDER / "3.json").touch()  # of a driver that was killed at once
    train(rows_survey, order, tmp_path, 2, 16, workers=1)
    train(rows_survey, order, tmp_path / "whole", 0, 16, workers=1)
    assert sorted_steps(tmp_path) == sorted_steps(tmp_path / "whole")
    assert [step.update for step in steps(tmp_path)] == list(range(1, 17))
    expected = {(i, offset) for i, file in enumerate(rows_survey.files) for offset in offsets(Path(file.path))}
    for epoch in (0, 1):
        trained = [row for step in steps(tmp_path) if step.epoch == epoch for row in step.rows]
        assert len(trained) == len(expected) == sum(SIZES.values()) and set(trained) == expected
    assert [epoch.exact for epoch in epochs(tmp_path)] == [True, True]
    assert main(str(tmp_path)) == 0


def offsets(path: Path) -> list[int]:
    """Return the byte offsets of the lines of a file."""
    lengths = [len(line) for line in path.read_bytes().splitlines(keepends=True)]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def test_a_step_that_one_worker_did_not_reach_is_left_out(rows_survey, tmp_path):
    log = train(rows_survey, order_of(rows_survey), tmp_path, 0, 8, workers=2)
    short = tmp_path / FOLDER / f"{log.number}-1.jsonl"
    short.write_text(short.read_text()[:-9])
    assert [step.update for step in steps(tmp_path)] == list(range(1, 8))
    (epoch,) = epochs(tmp_path)
    assert not epoch.exact and "7 of 8 steps, none too often" in epoch.describe()
    assert main(str(tmp_path)) == 0  # the run is not finished


@pytest.mark.parametrize("wrong", ["twice", "never"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"drop_last": True},
        {"drop_last": True, "together": True},
        {"weights": {"small.jsonl": 2.5}},
        {"weights": {"small.jsonl": 0.5, "large.jsonl": 0.5}},
        {"weights": {"small.jsonl": 2.0, "large.jsonl": 0.5}, "max_examples": 30, "together": True},
    ],
)
def test_an_epoch_with_a_wrong_row_is_not_exact(rows_survey, tmp_path, flags, wrong):
    """Also with weights and --dataloader_drop_last; updates have 3 steps, the last of an epoch fewer."""
    weights = {f"{Path(rows_survey.files[0].path).parent}/{k}": v for k, v in flags.get("weights", {}).items()}
    order = order_of(rows_survey, **{**flags, "weights": weights})
    updates = -(-order.steps // 3)
    log = train(rows_survey, order, tmp_path, 0, updates, 2, every=3)
    train(rows_survey, order, tmp_path, 2, 2 * updates, 3, every=3)
    assert [epoch.exact for epoch in epochs(tmp_path)] == [True, True]

    path = tmp_path / FOLDER / f"{log.number}-0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for line in lines for row in line["rows"]]
    row, other = next((a, b) for a, b in combinations(rows, 2) if a[0] == b[0] and a != b)
    if wrong == "twice":
        row[:] = other
    else:
        next(line["rows"] for line in lines if row in line["rows"]).remove(row)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = epochs(tmp_path)
    assert not first.exact and second.exact
    assert main(str(tmp_path)) == 1


def test_a_repeated_row_is_named(rows_survey, tmp_path):
    order = order_of(rows_survey)
    train(rows_survey, order, tmp_path, 0, 8, workers=1)
    path = tmp_path / FOLDER / "1-0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["rows"][0] = lines[5]["rows"][1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, offset = lines[5]["rows"][1]
    (epoch,) = epochs(tmp_path)
    assert epoch.too_often == [(rows_survey.files[file].name, offset)] and epoch.too_seldom == 1
    assert f"1 rows too often {rows_survey.files[file].name}:{offset}, 1 too seldom" in epoch.describe()


def test_attempts_are_numbered_across_processes(rows_survey, tmp_path):
    log = RowLog.of(tmp_path, rows_survey, order_of(rows_survey))
    numbers = [
        log.begin(0, 1).number,
        log.begin(3, 2).number,
        RowLog.of(tmp_path, rows_survey, order_of(rows_survey)).begin(3, 1),
    ]
    assert numbers[:2] == [1, 2] and numbers[2].number == 3
    assert json.loads((tmp_path / FOLDER / "2.json").read_text())["first_update"] == 3


def test_a_run_without_records_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--log_rows"):
        main(str(tmp_path))
