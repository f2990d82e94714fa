"""Mining, training and evaluating as jobs on a cluster of three hosts: what comes out is what one machine makes.

Real processes and sockets: `ray up`, `ray job submit` and `ray down`, as a person types them.
"""

import json
import random
import time
import warnings
from pathlib import Path

import hosts
import pytest
import ray
from clusters import OnHosts, OnOneMachine
from tiny import make_tiny

from raybge import evaluate_retrieval, finetune, mine_hard_negatives

ROWS, PASSAGES = 48, 160
SCALE = {"cpus_per_worker": 2}  # with 3 CPUs on a node, each worker has a node of its own
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
    """Three hosts; where the machine permits none, three nodes on it."""
    if why := hosts.missing():
        warnings.warn(f"no hosts of their own ({why}): the three nodes are processes of this one", stacklevel=1)
        place = OnOneMachine(tmp_path_factory.mktemp("shared"))
        place.up()
        yield place
        place.down()
        return
    with hosts.Hosts() as three:
        place = OnHosts(three)
        place.up()
        yield place


@pytest.fixture(scope="module")
def files(cluster, words) -> dict[str, str]:
    """A model without dropout, passages, and queries that are parts of them, on the shared folder."""
    folder, chance = cluster.shared, random.Random(5)
    size = {"vocab_size": 4 + len(words), "hidden_size": 32, "intermediate_size": 64}
    model = make_tiny(folder / "model", dropout=0.0, pooler=False, words=words, **size)
    texts = [" ".join(chance.choices(words, k=8)) for _ in range(PASSAGES)]
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
    """Flags of the four commands, but for those that say where the output goes and who does the work."""
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
def made(cluster, commands) -> Path:
    """The shared folder once the four commands have run as jobs."""
    shared = cluster.shared
    places = {
        "mine": {"output_file": shared / "mined.jsonl"},
        "train": {"output_dir": shared / "trained"},
        "evaluate": {"storage_path": shared / "work", "metrics_file": shared / "metrics.json"},
        "tune": {"output_dir": shared / "search"},
    }
    says = {"mine": "3 actors", "train": "3 training workers", "evaluate": "3 actors", "tune": "trials 2 at a time"}
    for name, place in places.items():
        workers = 1 if name == "tune" else 3
        done = cluster.submit(*job(name, {**commands[name], **place, "num_workers": workers}))
        assert (done.submitted, done.exit_code) == (0, 0), done.output
        assert f"Ray cluster of 3 nodes, 9 CPUs, no GPU; {says[name]}" in done.output, done.output
    return shared


@pytest.fixture(scope="module")
def ended(cluster) -> None:
    """The cluster has been taken down."""
    if isinstance(cluster, OnHosts):
        assert all(cluster.hosts.processes(address) for address in hosts.ADDRESSES)
    cluster.down()


def test_a_search_is_a_job(made):
    trials = json.loads((made / "search/trials.json").read_text())["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert (made / "search/best/modules.json").is_file() and (made / "search/report.html").is_file()


def test_a_jobs_own_exit_code_is_kept(cluster, files):
    """`ray job submit` itself only knows 0 and 1."""
    done = cluster.submit(*job("train", {"model_name_or_path": files["model"]}))
    assert (done.submitted, done.exit_code) == (1, 2)
    assert "raybge.train: missing: --train_data, --output_dir" in done.output


# --- what only hosts of their own can show --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_hosts(cluster) -> OnHosts:
    if isinstance(cluster, OnOneMachine):
        pytest.skip(f"one machine has one disk and one token ({hosts.missing()})")
    return cluster


def test_a_path_of_one_host_is_refused_before_the_start(three_hosts, files, commands):
    own = three_hosts.hosts.own
    training = {"model_name_or_path": files["model"], "train_data": files["groups"], "output_dir": "runs", **TRAINING}
    mining = {**commands["mine"], "output_file": own / "new.jsonl"}
    for command, says in (
        (job("train", training), "/runs lies in the job's copy of the working directory"),
        (job("mine", mining), f"--output_file {own}/new.jsonl: 2 of 3 nodes do not see"),
    ):
        done = three_hosts.submit(*command)
        assert done.exit_code == 2 and says in done.output and "all nodes share" in done.output, done.output
        assert "train  " not in done.output and "encode  " not in done.output  # no bar, so nothing began
    assert not list(three_hosts.hosts.base.glob("own?/new.jsonl"))


def test_without_the_token_no_job_is_taken(three_hosts):
    done = three_hosts.submit("jobs/train.py", "--help", mode="disabled")
    assert done.submitted != 0 and done.exit_code is None
    assert "401" in done.output or "token" in done.output.lower()


# --- after the last job ---------------------------------------------------------------------------------------------


def test_one_machine_makes_the_same(made, commands, ended, tmp_path):
    """With one worker."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        mine_hard_negatives(**commands["mine"], num_workers="1", output_file=str(tmp_path / "mined.jsonl"))
        finetune(**commands["train"], num_workers="1", output_dir=str(tmp_path / "trained"))
        alone = evaluate_retrieval(**commands["evaluate"], num_workers="1")
    finally:
        ray.shutdown()
    assert (tmp_path / "mined.jsonl").read_bytes() == (made / "mined.jsonl").read_bytes()
    assert len(losses(tmp_path / "trained")) == 8
    assert losses(made / "trained") == pytest.approx(losses(tmp_path / "trained"), rel=1e-5)
    assert json.loads((made / "metrics.json").read_text()) == pytest.approx(alone, rel=1e-12)


def test_ray_down_leaves_no_process(three_hosts, ended):
    """Within a minute and a half; most of it has passed since."""
    end = time.monotonic() + 120
    while left := {a: found for a in hosts.ADDRESSES if (found := three_hosts.hosts.processes(a))}:
        assert time.monotonic() < end, left
        time.sleep(1)
