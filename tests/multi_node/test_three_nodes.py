"""Mining, training and evaluation as jobs on a cluster of three hosts: the results equal those of one machine.

Real processes and sockets: `ray up`, `ray job submit` and `ray down`, as on the command line.
"""

import json
import random
import time
import warnings
from pathlib import Path

import hosts
import pytest
import ray
from clusters import ClusterOnHosts, ClusterOnOneMachine
from tiny import make_tiny

from raybge import evaluate_retrieval, finetune, mine_hard_negatives

pytestmark = pytest.mark.alone

ROWS, PASSAGES = 48, 160
SCALE = {"cpus_per_worker": 2}  # with 3 CPUs per node, each worker has its own node
MINING = {"range_for_sampling": "2-30", "negative_number": 3, "shard_size": 50, **SCALE}
TRAINING = {
    "train_group_size": 3,
    "global_batch_size": 12,
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "temperature": 0.1,
    "logging_steps": 1,
    **SCALE,
}
MEASURING = {"k": 20, **SCALE}
SEARCHING = {"num_samples": 2, "held_out": 0.25, "scheduler": "none", "search": "learning_rate=choice(1e-3,1e-4)"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start a cluster on three simulated hosts or, if the machine permits none, of three nodes on this machine."""
    if reason := hosts.missing():
        warnings.warn(f"no simulated hosts ({reason}): the three nodes are processes of this one", stacklevel=1)
        cluster = ClusterOnOneMachine(tmp_path_factory.mktemp("shared"))
        cluster.up()
        yield cluster
        cluster.down()
        return
    with hosts.Hosts() as three:
        cluster = ClusterOnHosts(three)
        cluster.up()
        yield cluster


@pytest.fixture(scope="module")
def files(cluster, words) -> dict[str, str]:
    """Write a model without dropout, passages, and queries that are parts of them, into the shared folder."""
    folder, rng = cluster.shared, random.Random(5)
    size = {"vocab_size": 4 + len(words), "hidden_size": 32, "intermediate_size": 64}
    model = make_tiny(folder / "model", dropout=0.0, pooler=False, words=words, **size)
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(PASSAGES)]
    groups = [{"query": " ".join(text.split()[:4]), "pos": [text]} for text in texts[:ROWS]]
    for name, rows in (("groups", groups), ("corpus", [{"text": text} for text in texts])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": model, "groups": str(folder / "groups.jsonl"), "corpus": str(folder / "corpus.jsonl")}


def job(name: str, flags: dict) -> list[str]:
    return [f"jobs/{name}.py", *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def commands(cluster, files) -> dict[str, dict]:
    """Return the flags of the four commands without output paths and number of workers."""
    mining = {"model_name_or_path": files["model"], "input_file": files["groups"], "corpus_data": files["corpus"]}
    training = {"model_name_or_path": files["model"], "train_data": f"{cluster.shared}/mined.jsonl", **TRAINING}
    measuring = {"encoder": f"{cluster.shared}/trained", "corpus_data": files["corpus"], "query_data": files["groups"]}
    return {
        "mine": {**mining, **MINING},
        "train": training,
        "evaluate": {**measuring, **MEASURING},
        "tune": {**training, **SEARCHING},
    }


@pytest.fixture(scope="module")
def results(cluster, commands) -> Path:
    """Run the four commands as jobs; return the shared folder."""
    shared = cluster.shared
    outputs = {
        "mine": {"output_file": shared / "mined.jsonl"},
        "train": {"output_dir": shared / "trained"},
        "evaluate": {"storage_path": shared / "work", "metrics_file": shared / "metrics.json"},
        "tune": {"output_dir": shared / "search"},
    }
    plans = {"mine": "3 actors", "train": "3 training workers", "evaluate": "3 actors", "tune": "trials 2 at a time"}
    for name, output in outputs.items():
        workers = 1 if name == "tune" else 3
        ended = cluster.submit(*job(name, {**commands[name], **output, "num_workers": workers}))
        assert (ended.submit_code, ended.exit_code) == (0, 0), ended.output
        assert f"Ray cluster of 3 nodes, 9 CPUs, no GPU; {plans[name]}" in ended.output, ended.output
    return shared


@pytest.fixture(scope="module")
def cluster_down(cluster) -> None:
    """Shut the cluster down."""
    if isinstance(cluster, ClusterOnHosts):
        assert all(cluster.hosts.processes(address) for address in hosts.ADDRESSES)
    cluster.down()


def test_hyperparameter_search_runs_as_a_job(results):
    trials = json.loads((results / "search/trials.json").read_text())["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert (results / "search/best/modules.json").is_file() and (results / "search/report.html").is_file()


def test_exit_code_of_a_job_is_reported(cluster, files):
    """`ray job submit` itself exits with 0 or 1."""
    ended = cluster.submit(*job("train", {"model_name_or_path": files["model"]}))
    assert (ended.submit_code, ended.exit_code) == (1, 2)
    assert "raybge.train: missing: --train_data, --output_dir" in ended.output


# --- requires simulated hosts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_hosts(cluster) -> ClusterOnHosts:
    if isinstance(cluster, ClusterOnOneMachine):
        pytest.skip(f"one machine has only one disk and one token ({hosts.missing()})")
    return cluster


def test_path_on_a_single_host_is_refused_before_the_start(three_hosts, files, commands):
    own = three_hosts.hosts.own
    training = {"model_name_or_path": files["model"], "train_data": files["groups"], "output_dir": "runs", **TRAINING}
    mining = {**commands["mine"], "output_file": own / "new.jsonl"}
    for command, message in (
        (job("train", training), "/runs is in the job's copy of the working directory"),
        (job("mine", mining), f"--output_file {own}/new.jsonl: 2 of 3 nodes do not see it"),
    ):
        done = three_hosts.submit(*command)
        assert done.exit_code == 2 and message in done.output and "all nodes share" in done.output, done.output
        assert "train  " not in done.output and "encode  " not in done.output  # no progress bar: nothing was started
    assert not list(three_hosts.hosts.base.glob("own?/new.jsonl"))


def test_job_without_the_token_is_refused(three_hosts):
    done = three_hosts.submit("jobs/train.py", "--help", mode="disabled")
    assert done.submit_code != 0 and done.exit_code is None
    assert "401" in done.output or "token" in done.output.lower()


# --- after the last job ---------------------------------------------------------------------------------------------


def test_one_worker_on_one_machine_gives_equal_results(results, commands, cluster_down, tmp_path):
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        mine_hard_negatives(**commands["mine"], num_workers="1", output_file=str(tmp_path / "mined.jsonl"))
        finetune(**commands["train"], num_workers="1", output_dir=str(tmp_path / "trained"))
        result = evaluate_retrieval(**commands["evaluate"], num_workers="1")
    finally:
        ray.shutdown()
    assert (tmp_path / "mined.jsonl").read_bytes() == (results / "mined.jsonl").read_bytes()
    assert len(losses(tmp_path / "trained")) == 8
    assert losses(results / "trained") == pytest.approx(losses(tmp_path / "trained"), rel=1e-5)
    metrics = {**result.metrics, **result.counts}
    assert json.loads((results / "metrics.json").read_text()) == pytest.approx(metrics, rel=1e-12)


def test_ray_down_ends_all_processes(three_hosts, cluster_down):
    """Within two minutes, most of which have passed during the previous test."""
    end = time.monotonic() + 120
    while left := {a: running for a in hosts.ADDRESSES if (running := three_hosts.hosts.processes(a))}:
        assert time.monotonic() < end, left
        time.sleep(1)
