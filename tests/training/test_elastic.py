"""When an elastic run ends its workers, and how many the next start has; the cluster is made up."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import ray

from raybge.cluster.resources import Cluster, Plan
from raybge.data.order import Order
from raybge.training import elastic
from raybge.training.checkpoint.manifest import RECORD
from raybge.training.elastic import Elastic, within


@dataclass(frozen=True)
class Config:
    """What of a WorkerConfig depends on the workers' number."""

    training: dict
    reading_cpus: float
    order: Order


PLAN = Plan(2, 2, 0, (2, 4))
TOTAL = 20  # updates of the run


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A cluster of nodes with so many CPUs each, one of them always for reading; others may use some of the CPUs."""
    state = SimpleNamespace(nodes=[2, 3], used=0, slept=[], storage=tmp_path)

    def look() -> Cluster:
        nodes = tuple(state.nodes)
        return Cluster(False, sum(nodes), 0, len(nodes), nodes, (0,) * len(nodes))

    def free() -> dict[str, float]:
        return {"CPU": sum(state.nodes) - PLAN.workers * PLAN.cpus - state.used}

    monkeypatch.setattr(elastic, "look", look)
    monkeypatch.setattr(elastic, "grown", lambda *_: look())
    monkeypatch.setattr(elastic, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(elastic, "LOST_SECONDS", 0.05)
    monkeypatch.setattr(ray, "available_resources", free)
    return state


@pytest.fixture
def board():
    ended = []
    progress = SimpleNamespace(total=TOTAL)
    return SimpleNamespace(read=lambda: progress, end=lambda: ended.append(True), ended=ended)


@pytest.fixture
def run(place) -> Elastic:
    made = Elastic(2, 4, place.storage)
    made.begin()
    return made


def checkpoint(place, update: int) -> None:
    folder = place.storage / f"checkpoint-{update}"
    folder.mkdir()
    about = dict(data="", global_batch=8, seed=1, gradient_accumulation_steps=1, order="")
    (folder / RECORD).write_text(json.dumps({"step": update, "epoch": 0, "position": update, **about}))


def test_workers_are_ended_behind_the_next_checkpoint(place, board, run):
    checkpoint(place, 4)
    run.watch(PLAN, board)
    place.nodes += [2, 2, 2]
    run.watch(PLAN, board)
    run.watch(PLAN, board)
    assert not board.ended  # the steps since the last checkpoint would be lost
    checkpoint(place, 6)
    for _ in range(3):
        run.watch(PLAN, board)
    assert board.ended == [True]
    assert run.settled(PLAN, False, print) == 4  # no more than MAX


@pytest.mark.parametrize(("nodes", "used"), [([2, 3], 0), ([2, 3, 2], 2), ([2, 4], 0)])
def test_a_run_does_not_grow_into_what_others_use_or_what_reads(place, board, run, nodes, used):
    place.nodes, place.used = nodes, used
    for update in (4, 6, 8):
        checkpoint(place, update)
        run.watch(PLAN, board)
    assert not board.ended


def test_behind_the_last_checkpoint_there_is_nothing_to_share(place, board, run):
    place.nodes += [2]
    run.watch(PLAN, board)
    checkpoint(place, TOTAL)
    run.watch(PLAN, board)
    assert not board.ended


def test_a_worker_that_fails_by_itself_is_a_failure(place, run):
    assert run.settled(PLAN, True, print) is None


def test_a_lost_node_leaves_fewer_workers(place, run, monkeypatch):
    """Ray misses it a moment later."""
    plan = Plan(3, 2, 0, (2, 4))
    place.nodes = [2, 3, 2]
    monkeypatch.setattr(elastic.time, "sleep", lambda _: place.nodes.clear() or place.nodes.extend([2, 3]))
    assert run.settled(plan, True, print) == 2


def test_fewer_than_the_fewest_wait_for_a_node(place, run, monkeypatch):
    place.nodes = [3]
    waits = iter([[3], [2, 3]])

    def sleep(_: float) -> None:
        place.nodes = next(waits)

    monkeypatch.setattr(elastic.time, "sleep", sleep)
    said = []
    assert run.settled(PLAN, False, said.append) == 2
    assert said == ["Ray cluster of 1 node, 3 CPUs, no GPU: waiting for 1 worker of 2 CPUs more, at least 2 train"]


def test_another_number_of_workers_has_other_shares_of_the_same_batch(place, run):
    place.nodes = [8, 8]
    config, plan = run.resized(Config({"per_device_train_batch_size": 16, "seed": 3}, 2.0, Order([99], 32, 1)), PLAN, 3)
    assert config.training == {"per_device_train_batch_size": 11, "seed": 3}
    assert plan == Plan(3, 2, 0, (2, 4)) and config.reading_cpus == pytest.approx((16 - 3 * 2) / 3)


def test_no_more_workers_than_lanes(capsys):
    assert within(Plan(4, 1, 0, (2, 6)), 3, print) == Plan(3, 1, 0, (2, 3))
    assert "at most 3 workers can share the global batch" in capsys.readouterr().out
    assert within(Plan(4, 1, 0, (2, 6)), 8, print) == Plan(4, 1, 0, (2, 6))
    assert within(Plan(4, 1, 0, (4, 6)), 3, print).range == (4, 6)  # that is refused where the order is made
