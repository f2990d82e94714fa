"""The whole recipe as a job on one machine: `ray start --head` and `ray job submit`, as on a laptop."""

import json
import random
from pathlib import Path

import hosts
import pytest
from clusters import OBJECT_STORE, ROOT, OnOneMachine
from tiny import make_tiny

STAGES = ("before", "mine-1", "train-1", "mine-2", "train-2", "merge", "after")


@pytest.fixture
def command(tmp_path, words) -> list[str]:
    """The recipe with a random model, twelve groups, and the passages to search."""
    chance = random.Random(3)
    texts = [" ".join(chance.choices(words, k=6)) for _ in range(30)]
    groups = [{"query": " ".join(text.split()[:3]), "pos": [text]} for text in texts[:12]]
    for name, rows in (("groups", groups), ("corpus", [{"text": text} for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_tiny(tmp_path / "model", pooler=False, words=words, vocab_size=4 + len(words))
    data = {"train_data": "groups", "corpus_data": "corpus", "query_data": "groups"}
    flags = [word for flag, name in data.items() for word in (f"--{flag}", f"{tmp_path}/{name}.jsonl")]
    return ["jobs/recipe.py", "--model_name_or_path", model, "--output_dir", f"{tmp_path}/runs", *flags]


def submitted(command: list[str], folder: Path) -> tuple[int, str]:
    """Run it as a job on a machine of 2 CPUs; exit code and output."""
    if hosts.missing():
        place = OnOneMachine(folder, nodes=1)
        place.up()
        try:
            done = place.submit(*command)
        finally:
            place.down()
        return done.submitted, done.output
    script = f"""
        ray get-auth-token --generate
        ray start --head --num-cpus=2 --object-store-memory={OBJECT_STORE}
        cd {ROOT}
        ray job submit --working-dir . -- python {" ".join(command)}
    """
    door = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://localhost:8265"}
    ended = hosts.run_alone(script, folder, HOME=str(folder), **door)
    return ended.returncode, ended.stdout


def test_the_recipe_runs_to_its_end(command, tmp_path):
    code, output = submitted(command, tmp_path)
    assert code == 0, output
    runs = tmp_path / "runs"
    assert tuple(json.loads((runs / "stages.json").read_text())) == STAGES
    assert (runs / "model-2/modules.json").is_file() and (runs / "model/modules.json").is_file()
    after = json.loads((runs / "after.json").read_text())
    assert f"{after['nDCG@10']:.4f}" in output.partition("nDCG@10")[2].splitlines()[0], output
