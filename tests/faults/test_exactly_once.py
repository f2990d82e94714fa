"""Runs that lose workers, a node and their own program end as a run that lost nothing: rows, weights and losses."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import strikes
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file
from tiny import make_tiny

from raybge.train import finetune
from raybge.training import controller as launch
from raybge.training import elastic
from raybge.training.row_records import epochs, steps

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
GROUPS, BATCH, EPOCHS = 34, 6, 4  # 6 steps an epoch, of which the last has 4 groups
UPDATES = 12  # 3 of an epoch, of two steps each; every second leaves a checkpoint
# with 2 CPUs for each of two workers, both nodes have one
NODE = {"num_cpus": 3, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(strikes)  # workers cannot import the tests
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    nodes = Cluster(True, head_node_args={"_system_config": quick, **NODE})
    nodes.add_node(**NODE)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """No dropout."""
    folder = tmp_path_factory.mktemp("given")

    def group(i: int) -> dict:
        chance = np.random.default_rng(i)
        query, *texts = (" ".join(chance.choice(WORDS, n)) for n in (3, 8, 8, 8))
        return {"query": query, "pos": texts[:1], "neg": texts[1:]}

    (folder / "groups.jsonl").write_text("".join(json.dumps(group(i)) + "\n" for i in range(GROUPS)))
    return dict(
        model_name_or_path=make_tiny(folder / "tiny", dropout=0.0),
        train_data=str(folder / "groups.jsonl"),
        global_batch_size=BATCH,
        gradient_accumulation_steps=2,
        train_group_size=3,
        learning_rate=1e-3,
        num_train_epochs=EPOCHS,
        temperature=0.1,
        logging_steps=1,
        passage_max_len=16,
        save_steps=2,
        log_rows=True,
    )


@pytest.fixture(scope="module")
def undisturbed(cluster, flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    finetune(**flags, output_dir=str(output), num_workers="2", cpus_per_worker=2)
    return output


def assert_exactly_once(output: Path, data: str) -> None:
    """Each line of the file once an epoch, in steps of a global batch; the last of an epoch has what is left."""
    starts = np.cumsum([0, *map(len, Path(data).read_bytes().splitlines(keepends=True))])[:-1].tolist()
    trained = list(steps(output))
    for epoch in range(EPOCHS):
        own = [step for step in trained if step.epoch == epoch]
        assert Counter(row for step in own for row in step.rows) == Counter((0, start) for start in starts)
        assert [len(step.rows) for step in own] == [BATCH] * (GROUPS // BATCH) + [GROUPS % BATCH]
        assert [step.update for step in own] == [3 * epoch + 1 + step // 2 for step in range(6)]
    assert [epoch.exact for epoch in epochs(output)] == [True] * EPOCHS


def weights(folder: Path | str, but: str = "none") -> np.ndarray:
    found = load_file(Path(folder, "model.safetensors"))
    return np.concatenate([value.ravel() for name, value in sorted(found.items()) if but not in name])


def assert_same_end(output: Path, undisturbed: Path, model: str, but: str = "none") -> None:
    before, after, expected = (weights(folder, but) for folder in (model, output, undisturbed))
    moved = np.linalg.norm(expected - before)
    assert moved > 0.1 and np.linalg.norm(after - expected) < 1e-5 * moved


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def renew(cluster: Cluster) -> None:
    """Put another node into the place of the lost one."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def struck_command(cluster: Cluster, plan: list[tuple[int, str]], folder: Path, flags: dict) -> list[str]:
    """The program with faults, into folder/out."""
    (folder / "marks").mkdir()
    told = {"strikes": plan, "marks": str(folder / "marks"), "head": cluster.head_node.node_id}
    given = {**flags, "cpus_per_worker": 2, "output_dir": folder / "out", "address": cluster.address}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [sys.executable, strikes.__file__, json.dumps(told), *words]


def run_to_its_end(command: list[str], folder: Path, after: dict[str, Callable[[], None]]) -> int:
    """Start the program, and again with --resume whenever it was killed; how often. `after`: what follows a strike."""
    starts, seen = 0, set()
    with open(folder / "log", "w") as out:
        while True:
            process = subprocess.Popen([*command, *["--resume"] * (starts > 0)], stdout=out, stderr=out)
            starts += 1
            while process.poll() is None:
                for mark in set((folder / "marks").glob("*-*")) - seen:
                    seen.add(mark)
                    after.get(mark.name.partition("-")[2], lambda: None)()
                time.sleep(0.2)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, (folder / "log").read_text()
                return starts


def test_workers_come_and_go_with_the_nodes(cluster, flags, undisturbed, tmp_path):
    """A node comes: behind the next checkpoint there are two workers. It is lost: the run goes on with one."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node)

    def grow() -> None:
        cluster.add_node(**NODE)
        time.sleep(3 * elastic.LOOK_SECONDS)  # it is seen before there is a checkpoint
        (tmp_path / "marks/go").touch()

    plan = [(3, "wait"), (4, "hold"), (9, "node")]
    command = struck_command(cluster, plan, tmp_path, {**flags, "num_workers": "1-3"})
    try:
        assert run_to_its_end(command, tmp_path, {"wait": grow}) == 1
    finally:
        renew(cluster)  # for the other tests
    said = (tmp_path / "log").read_text()
    assert "1 to 3 training workers of 2 CPUs, 1 now" in said
    assert "continues from checkpoint-4 with 2 workers of 2 CPUs, 1 before" in said
    assert "continues from checkpoint-8 with 1 worker of 2 CPUs, 2 before" in said
    starts = [json.loads((tmp_path / f"out/rows/{n}.json").read_text()) for n in (1, 2, 3)]
    assert [(start["first_update"], start["workers"]) for start in starts] == [(0, 1), (4, 2), (8, 1)]
    assert_exactly_once(tmp_path / "out", flags["train_data"])
    # A key's bias has no gradient, and of the rounding of other sums Adam makes steps.
    assert_same_end(tmp_path / "out", undisturbed, flags["model_name_or_path"], but="key.bias")


def test_five_kills_leave_no_trace(cluster, flags, undisturbed, tmp_path):
    """kill -9 at random updates: two workers, the raylet of a node with one of them, and twice the program itself."""
    chance = random.Random(9)
    what = chance.sample(["worker", "worker", "node", "driver", "driver"], 5)
    plan = list(zip(sorted(chance.sample(range(UPDATES), 5)), what, strict=True))
    command = struck_command(cluster, plan, tmp_path, {**flags, "num_workers": 2, "max_failures": -1})
    starts = run_to_its_end(command, tmp_path, {"node": lambda: renew(cluster)})
    output = tmp_path / "out"
    assert starts == 3 and len(list((tmp_path / "marks").iterdir())) == 5, plan
    assert len(list((output / "rows").glob("*.json"))) >= 6
    assert_exactly_once(output, flags["train_data"])
    assert_same_end(output, undisturbed, flags["model_name_or_path"])


def test_a_run_stopped_on_two_workers_goes_on_with_one_and_with_three(
    cluster, flags, undisturbed, tmp_path, monkeypatch
):
    """The batch is the one of the start, and not the workers' number times something."""
    del (given := dict(flags))["global_batch_size"]
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_train_worker", strikes.struck([(7, "stop")], str(tmp_path)))
        with pytest.raises(OSError, match="No space"):
            finetune(
                **given, per_device_train_batch_size=3, output_dir=str(stopped), num_workers="2", cpus_per_worker=1
            )
    for workers in (1, 3):
        output = tmp_path / f"with-{workers}"
        shutil.copytree(stopped, output)
        finetune(**given, output_dir=str(output), num_workers=str(workers), cpus_per_worker=1, resume=True)
        last = max((output / "rows").glob("*.json"))
        assert json.loads(last.read_text())["workers"] == workers
        assert_exactly_once(output, flags["train_data"])
        assert len(losses(output)) == UPDATES
        assert losses(output) == pytest.approx(losses(undisturbed), rel=0, abs=1e-4)
