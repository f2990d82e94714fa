"""What `ray job submit` runs: exit codes, and the recipe's chain of stages."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import make_tiny

from raybge.cli.run import COMMANDS

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", [job for job in JOBS if job != "recipe"])
@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_jobs_exit_code_is_the_commands(job, code, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"raybge.{job}"), "main", lambda: code)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert ended.value.code == code


def test_each_command_has_its_job():
    """All but the demo, which is for a laptop."""
    assert {*JOBS} == {*COMMANDS} - {"demo"} | {"recipe"}


def test_a_job_as_a_program():
    """Run as Ray runs it: the script's own folder comes first on the path."""
    done = subprocess.run(
        [sys.executable, "jobs/train.py", "--output_dir", "x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "raybge.train: missing: --model_name_or_path" in done.stderr


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("recipe_job", ROOT / "jobs/recipe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe_job"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words_of(tmp_path_factory, words) -> dict[str, str]:
    """Sixteen groups of the tiny model's words, with what they are searched in."""
    folder = tmp_path_factory.mktemp("given")
    texts = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(6)) for i in range(40)]
    groups = [{"query": " ".join(texts[i].split()[:3]), "pos": [texts[i]]} for i in range(16)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "train_data": str(folder / "groups.jsonl"),
        "corpus_data": str(folder / "corpus.jsonl"),
        "query_data": str(folder / "groups.jsonl"),
    }


def argv(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


class Stages:
    """In place of the commands: each notes what it writes, and writes no more than that. At `breaks_at` one fails."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.breaks_at: str | None = None
        self.restarts: set[int] = set()  # that training was given

    def command(self, flag):
        def run(arguments, console):
            path = Path(arguments.training[flag] if flag == "output_dir" else getattr(arguments, flag))
            self.began.append(path.name)
            if flag == "output_dir":
                self.restarts.add(arguments.max_failures)
            if path.name == self.breaks_at:
                raise OSError("no space left")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"nDCG@10": 0.5, "MRR@10": 0.5, "Recall@100": 1.0}))

        return run


@pytest.fixture
def stages(recipe, monkeypatch) -> Stages:
    stages = Stages()
    outputs = {"mine": "output_file", "train": "output_dir", "merge": "output_path", "evaluate": "metrics_file"}
    for name, flag in outputs.items():
        monkeypatch.setattr(recipe, name, stages.command(flag))
    monkeypatch.setattr(recipe, "connect", lambda address, verbose: nullcontext())
    return stages


def test_the_recipe_is_gone_through_once(recipe, stages, words_of, tiny_model, tmp_path, capfd):
    """Stopped in the fourth stage, it goes on there; finished, it does nothing; with other flags, it refuses."""
    output = tmp_path / "out"
    given = argv({**words_of, "model_name_or_path": tiny_model, "output_dir": str(output), "num_workers": "1"})
    stages.breaks_at = "mined-2.jsonl"
    assert recipe.main(given) == 1
    assert "no space left" in capfd.readouterr().err
    assert stages.began == ["before.json", "mined-1.jsonl", "model-1", "mined-2.jsonl"]

    stages.began, stages.breaks_at = [], None
    assert recipe.main([*given, "--max_failures", "3"]) == 0
    assert stages.restarts == {0, 3}
    assert stages.began == ["mined-2.jsonl", "model-2", "model", "after.json"]
    said = capfd.readouterr().out
    assert "train-1  finished" in said and "train-2  to do" in said and "nDCG@10" in said

    stages.began = []
    assert recipe.main(given) == 0
    assert recipe.main([*given, "--seed", "1"]) == 2
    assert "stage mine-1 was run there with seed 42, now it is 1" in capfd.readouterr().err
    assert not stages.began


def test_the_second_round_goes_on_with_the_first_ones_model(recipe, words_of, tiny_model, tmp_path):
    given = recipe.RecipeOptions(model_name_or_path=tiny_model, output_dir=str(tmp_path), **words_of)
    stages = {stage.name: stage.flags for stage in recipe.chain(given)}
    assert list(stages) == ["before", "mine-1", "train-1", "mine-2", "train-2", "merge", "after"]
    first, second = (stages[f"train-{i}"]["output_dir"] for i in (1, 2))
    assert stages["mine-2"]["model_name_or_path"] == stages["train-2"]["model_name_or_path"] == first
    assert stages["train-2"]["train_data"] == stages["mine-2"]["output_file"]
    assert stages["merge"]["model_names_or_paths"] == [second, tiny_model]
    assert stages["after"]["encoder"] == stages["merge"]["output_path"] and stages["before"]["encoder"] == tiny_model


def test_wrong_flags_are_said_before_the_first_stage(recipe, words_of, tmp_path, capfd):
    given = argv({**words_of, "model_name_or_path": make_tiny(tmp_path / "m"), "output_dir": str(tmp_path / "out")})
    assert recipe.main([*given, "--on_bad_rows", "keep"]) == 2
    assert "--on_bad_rows" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
