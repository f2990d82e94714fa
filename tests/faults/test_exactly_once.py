"""Runs that lose workers, a node and their driver end with the rows, weights and losses of an uninterrupted run."""

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

import fault_injection
import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file
from tiny import make_tiny

from raybge.train import finetune
from raybge.training import controller, elastic
from raybge.training.row_records import epochs, steps

pytestmark = pytest.mark.alone

WORDS = "what is a lane row block of the text that we read and sort by length in chunks on one node".split()
GROUPS, BATCH, EPOCHS = 34, 6, 4  # an epoch has 6 steps, the last of them with 4 groups
UPDATES = 12  # 3 per epoch, of two steps each; every second saves a checkpoint
# With 2 CPUs for each of two workers, both nodes have one worker.
NODE = {"num_cpus": 3, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(fault_injection)  # workers cannot import the tests
    fast_checks = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    nodes = Cluster(True, head_node_args={"_system_config": fast_checks, **NODE})
    nodes.add_node(**NODE)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Return the flags of a run without dropout."""
    folder = tmp_path_factory.mktemp("inputs")

    def group(i: int) -> dict:
        random = np.random.default_rng(i)
        query, *texts = (" ".join(random.choice(WORDS, n)) for n in (3, 8, 8, 8))
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
def reference(cluster, flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "out"
    finetune(**flags, output_dir=str(output), num_workers="2", cpus_per_worker=2)
    return output


def assert_exactly_once(output: Path, data: str) -> None:
    """Check that every epoch has each line of the file once, in steps of a global batch, the last with the rest."""
    starts = np.cumsum([0, *map(len, Path(data).read_bytes().splitlines(keepends=True))])[:-1].tolist()
    all_steps = list(steps(output))
    for epoch in range(EPOCHS):
        epoch_steps = [step for step in all_steps if step.epoch == epoch]
        assert Counter(row for step in epoch_steps for row in step.rows) == Counter((0, start) for start in starts)
        assert [len(step.rows) for step in epoch_steps] == [BATCH] * (GROUPS // BATCH) + [GROUPS % BATCH]
        assert [step.update for step in epoch_steps] == [3 * epoch + 1 + step // 2 for step in range(6)]
    assert [epoch.exact for epoch in epochs(output)] == [True] * EPOCHS


def weights(folder: Path | str, excluded: str = "none") -> np.ndarray:
    """Return the weights as one vector, without those whose name contains `excluded`."""
    values = load_file(Path(folder, "model.safetensors"))
    return np.concatenate([value.ravel() for name, value in sorted(values.items()) if excluded not in name])


def assert_same_weights(output: Path, reference: Path, model: str, excluded: str = "none") -> None:
    """Check that two runs end with equal weights, relative to the movement from `model`."""
    before, after, expected = (weights(folder, excluded) for folder in (model, output, reference))
    movement = np.linalg.norm(expected - before)
    assert movement > 0.1 and np.linalg.norm(after - expected) < 1e-5 * movement


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def replace_node(cluster: Cluster) -> None:
    """Replace the lost node by a new one."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def command_with_faults(cluster: Cluster, faults: list[tuple[int, str]], folder: Path, flags: dict) -> list[str]:
    """Return the command of a run with faults whose output is folder/out."""
    (folder / "markers").mkdir()
    settings = {"faults": faults, "markers": str(folder / "markers"), "head": cluster.head_node.node_id}
    flags = {**flags, "cpus_per_worker": 2, "output_dir": folder / "out", "address": cluster.address}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, fault_injection.__file__, json.dumps(settings), *words]


def run_until_finished(command: list[str], folder: Path, reactions: dict[str, Callable[[], None]]) -> int:
    """Run the command, again with --resume whenever it was killed. Return the number of starts.

    `reactions` has functions to call after a fault, by its kind.
    """
    starts, seen = 0, set()
    with open(folder / "log", "w") as out:
        while True:
            process = subprocess.Popen([*command, *["--resume"] * (starts > 0)], stdout=out, stderr=out)
            starts += 1
            while process.poll() is None:
                for marker in set((folder / "markers").glob("*-*")) - seen:
                    seen.add(marker)
                    reactions.get(marker.name.partition("-")[2], lambda: None)()
                time.sleep(0.2)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, (folder / "log").read_text()
                return starts


def test_worker_count_follows_the_nodes(cluster, flags, reference, tmp_path):
    """A node joins: after the next checkpoint there are two workers. It is lost: the run continues with one."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node)

    def grow() -> None:
        cluster.add_node(**NODE)
        time.sleep(3 * elastic.CHECK_SECONDS)  # the run has to see it before there is a checkpoint
        (tmp_path / "markers/go").touch()

    faults = [(3, "wait"), (4, "hold"), (9, "node")]
    command = command_with_faults(cluster, faults, tmp_path, {**flags, "num_workers": "1-3"})
    try:
        assert run_until_finished(command, tmp_path, {"wait": grow}) == 1
    finally:
        replace_node(cluster)  # for the other tests
    console = (tmp_path / "log").read_text()
    assert "1 to 3 training workers of 2 CPUs, 1 now" in console
    assert "continues from checkpoint-4 with 2 workers of 2 CPUs, 1 before" in console
    assert "continues from checkpoint-8 with 1 worker of 2 CPUs, 2 before" in console
    starts = [json.loads((tmp_path / f"out/rows/{n}.json").read_text()) for n in (1, 2, 3)]
    assert [(start["first_update"], start["workers"]) for start in starts] == [(0, 1), (4, 2), (8, 1)]
    assert_exactly_once(tmp_path / "out", flags["train_data"])
    # The bias of a key has no gradient: Adam turns the rounding errors of another summation order into steps.
    assert_same_weights(tmp_path / "out", reference, flags["model_name_or_path"], excluded="key.bias")


def test_five_kills_change_nothing(cluster, flags, reference, tmp_path):
    """kill -9 at random updates: two workers, the raylet of a node with one of them, and twice the driver."""
    rng = random.Random(9)
    kinds = rng.sample(["worker", "worker", "node", "driver", "driver"], 5)
    faults = list(zip(sorted(rng.sample(range(UPDATES), 5)), kinds, strict=True))
    command = command_with_faults(cluster, faults, tmp_path, {**flags, "num_workers": 2, "max_failures": -1})
    starts = run_until_finished(command, tmp_path, {"node": lambda: replace_node(cluster)})
    output = tmp_path / "out"
    assert starts == 3 and len(list((tmp_path / "markers").iterdir())) == 5, faults
    assert len(list((output / "rows").glob("*.json"))) >= 6
    assert_exactly_once(output, flags["train_data"])
    assert_same_weights(output, reference, flags["model_name_or_path"])


def test_run_stopped_on_two_workers_resumes_on_one_and_on_three(cluster, flags, reference, tmp_path, monkeypatch):
    """The global batch is that of the first start, and not a multiple of the number of workers."""
    del (flags := dict(flags))["global_batch_size"]
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(controller, "_train_worker", fault_injection.train_worker_with([(7, "stop")], str(tmp_path)))
        with pytest.raises(OSError, match="No space"):
            finetune(
                **flags, per_device_train_batch_size=3, output_dir=str(stopped), num_workers="2", cpus_per_worker=1
            )
    for workers in (1, 3):
        output = tmp_path / f"with-{workers}"
        shutil.copytree(stopped, output)
        finetune(**flags, output_dir=str(output), num_workers=str(workers), cpus_per_worker=1, resume=True)
        last = max((output / "rows").glob("*.json"))
        assert json.loads(last.read_text())["workers"] == workers
        assert_exactly_once(output, flags["train_data"])
        assert len(losses(output)) == UPDATES
        assert losses(output) == pytest.approx(losses(reference), rel=0, abs=1e-4)
