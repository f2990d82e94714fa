"""Growth, shrinking and restarts of an elastic run on a simulated cluster."""

import json
from types import SimpleNamespace

import pytest
import ray

from raybge.cluster.resources import Cluster, Plan
from raybge.training import elastic
from raybge.training.checkpoint.manifest import MANIFEST
from raybge.training.elastic import ElasticPolicy, limit_to_lanes

PLAN = Plan(2, 2, 0, (2, 4))
TOTAL = 20  # updates of the run


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Return a simulated cluster: `nodes` are the CPUs of each node, one of which is for reading; others use `used`."""
    state = SimpleNamespace(nodes=[2, 3], used=0, storage=tmp_path)

    def current_cluster() -> Cluster:
        nodes = tuple(state.nodes)
        return Cluster(False, sum(nodes), 0, len(nodes), nodes, (0,) * len(nodes))

    def available_resources() -> dict[str, float]:
        return {"CPU": sum(state.nodes) - PLAN.workers * PLAN.cpus - state.used}

    monkeypatch.setattr(elastic, "current_cluster", current_cluster)
    monkeypatch.setattr(elastic, "wait_for_capacity", lambda *_: current_cluster())
    monkeypatch.setattr(elastic, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(elastic, "NODE_LOSS_SECONDS", 0.05)
    monkeypatch.setattr(ray, "available_resources", available_resources)
    return state


@pytest.fixture
def run_state():
    """Return a run state whose `kills` counts the calls of `kill_workers`."""
    state = SimpleNamespace(read=lambda: SimpleNamespace(total=TOTAL), kills=0)

    def kill_workers() -> None:
        state.kills += 1

    state.kill_workers = kill_workers
    return state


@pytest.fixture
def policy(cluster) -> ElasticPolicy:
    policy = ElasticPolicy(2, 4, cluster.storage)
    policy.start_attempt()
    return policy


def add_checkpoint(cluster, update: int) -> None:
    folder = cluster.storage / f"checkpoint-{update}"
    folder.mkdir()
    identity = dict(data="", global_batch=8, seed=1, gradient_accumulation_steps=1, order="")
    (folder / MANIFEST).write_text(json.dumps({"step": update, "epoch": 0, "position": update, **identity}))


def test_run_grows_after_the_next_checkpoint(cluster, run_state, policy):
    add_checkpoint(cluster, 4)
    policy.check_growth(PLAN, run_state)
    cluster.nodes += [2, 2, 2]
    policy.check_growth(PLAN, run_state)
    policy.check_growth(PLAN, run_state)
    assert not run_state.kills  # the steps since the last checkpoint would be lost
    add_checkpoint(cluster, 6)
    for _ in range(3):
        policy.check_growth(PLAN, run_state)
    assert run_state.kills == 1
    assert policy.workers_after_failure(PLAN, False, print) == 4  # at most MAX


@pytest.mark.parametrize(("nodes", "used"), [([2, 3], 0), ([2, 3, 2], 2), ([2, 4], 0)])
def test_run_does_not_grow_into_used_or_reading_cpus(cluster, run_state, policy, nodes, used):
    cluster.nodes, cluster.used = nodes, used
    for update in (4, 6, 8):
        add_checkpoint(cluster, update)
        policy.check_growth(PLAN, run_state)
    assert not run_state.kills


def test_run_does_not_grow_after_its_last_update(cluster, run_state, policy):
    cluster.nodes += [2]
    policy.check_growth(PLAN, run_state)
    add_checkpoint(cluster, TOTAL)
    policy.check_growth(PLAN, run_state)
    assert not run_state.kills


def test_failure_on_an_unchanged_cluster_is_one_of_the_workers(cluster, policy):
    assert policy.workers_after_failure(PLAN, True, print) is None


def test_lost_node_leaves_fewer_workers(cluster, policy, monkeypatch):
    """Ray reports the loss with a delay."""
    plan = Plan(3, 2, 0, (2, 4))
    cluster.nodes = [2, 3, 2]
    monkeypatch.setattr(elastic.time, "sleep", lambda _: cluster.nodes.clear() or cluster.nodes.extend([2, 3]))
    assert policy.workers_after_failure(plan, True, print) == 2


def test_run_waits_for_a_node_if_fewer_than_min_workers_fit(cluster, policy, monkeypatch):
    cluster.nodes = [3]
    later = iter([[3], [2, 3]])

    def sleep(_: float) -> None:
        cluster.nodes = next(later)

    monkeypatch.setattr(elastic.time, "sleep", sleep)
    lines = []
    assert policy.workers_after_failure(PLAN, False, lines.append) == 2
    assert lines == [
        "Ray cluster of 1 node, 3 CPUs, no GPU: waiting for 1 worker of 2 CPUs more; at least 2 are required"
    ]


def test_resized_run_has_another_share_of_the_reading_cpus(cluster, policy):
    cluster.nodes = [8, 8]
    plan, reading_cpus = policy.resize(PLAN, 3)
    assert plan == Plan(3, 2, 0, (2, 4)) and reading_cpus == pytest.approx((16 - 3 * 2) / 3)


def test_workers_are_limited_to_lanes(capsys):
    assert limit_to_lanes(Plan(4, 1, 0, (2, 6)), 3, print) == Plan(3, 1, 0, (2, 3))
    assert "at most 3 workers can share the global batch" in capsys.readouterr().out
    assert limit_to_lanes(Plan(4, 1, 0, (2, 6)), 8, print) == Plan(4, 1, 0, (2, 6))
    assert limit_to_lanes(Plan(4, 1, 0, (4, 6)), 3, print).range == (4, 6)  # the order refuses it later
