"""The complete recipe as a job on one machine: `ray start --head` and `ray job submit`, as on a laptop."""

import json
import random
from pathlib import Path

import hosts
import pytest
from clusters import OBJECT_STORE, ROOT, ClusterOnOneMachine
from tiny import make_tiny

pytestmark = pytest.mark.alone

STAGES = ("before", "mine-1", "train-1", "mine-2", "train-2", "merge", "after")


@pytest.fixture
def command(tmp_path, words) -> list[str]:
    """Return the command of the recipe with a random model, twelve groups and a corpus."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(words, k=6)) for _ in range(30)]
    groups = [{"query": " ".join(text.split()[:3]), "pos": [text]} for text in texts[:12]]
    for name, rows in (("groups", groups), ("corpus", [{"text": text} for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_tiny(tmp_path / "model", pooler=False, words=words, vocab_size=4 + len(words))
    data = {"train_data": "groups", "corpus_data": "corpus", "query_data": "groups"}
    flags = [word for flag, name in data.items() for word in (f"--{flag}", f"{tmp_path}/{name}.jsonl")]
    return ["jobs/recipe.py", "--model_name_or_path", model, "--output_dir", f"{tmp_path}/runs", *flags]


def submit(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command as a job on a machine of 2 CPUs; return exit code and output."""
    if hosts.missing():
        cluster = ClusterOnOneMachine(folder, nodes=1)
        cluster.up()
        try:
            job = cluster.submit(*command)
        finally:
            cluster.down()
        return job.submit_code, job.output
    script = f"""
        ray get-auth-token --generate
        ray start --head --num-cpus=2 --object-store-memory={OBJECT_STORE}
        cd {ROOT}
        ray job submit --working-dir . -- python {" ".join(command)}
    """
    environment = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://localhost:8265"}
    result = hosts.run_alone(script, folder, HOME=str(folder), **environment)
    return result.returncode, result.stdout


def test_recipe_runs_to_its_end(command, tmp_path):
    code, output = submit(command, tmp_path)
    assert code == 0, output
    runs = tmp_path / "runs"
    assert tuple(json.loads((runs / "stages.json").read_text())) == STAGES
    assert (runs / "model-2/modules.json").is_file() and (runs / "model/modules.json").is_file()
    after = json.loads((runs / "after.json").read_text())
    assert f"{after['nDCG@10']:.4f}" in output.partition("nDCG@10")[2].splitlines()[0], output
