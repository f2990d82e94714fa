"""Scripts for `ray job submit`: exit codes, and the stages of the recipe."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_tiny

from raybge.cli.run import COMMANDS

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", [job for job in JOBS if job != "recipe"])
@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_exit_code_of_a_job_is_its_commands(job, code, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"raybge.{job}"), "main", lambda: code)
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert error.value.code == code


def test_each_command_has_its_job():
    """All but the demo, the self-test and the export, which are for one machine."""
    assert {*JOBS} == {*COMMANDS} - {"demo", "selftest", "runs", "export"} | {"recipe"}


def test_a_job_as_a_program():
    """A job runs as Ray starts it: the script's folder is first on the path."""
    process = subprocess.run(
        [sys.executable, "jobs/train.py", "--output_dir", "x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and "raybge.train: missing: --model_name_or_path" in process.stderr


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
def data_flags(tmp_path_factory, words) -> dict[str, str]:
    """Flags of sixteen groups in the tiny model's words, and of their corpus."""
    folder = tmp_path_factory.mktemp("data")
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
    """Replacements of the commands: each records and writes its output file; the one of `fails_at` fails."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fails_at: str | None = None
        self.restarts: set[int] = set()  # values of max_failures that training received
        self.resumes: list[bool] = []  # values of resume

    def command(self, flag):
        def run(options, console):
            path = Path(options.training[flag] if flag == "output_dir" else getattr(options, flag))
            self.started.append(path.name)
            if flag == "output_dir":
                self.restarts.add(options.max_failures)
                self.resumes.append(options.resume)
            if path.name == self.fails_at:
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


def test_the_recipe_runs_each_stage_once(recipe, stages, data_flags, tiny_model, tmp_path, capfd):
    """After a failure in the fourth stage it continues there; finished, it does nothing; other flags are refused."""
    output = tmp_path / "out"
    words = argv({**data_flags, "model_name_or_path": tiny_model, "output_dir": str(output), "num_workers": "1"})
    stages.fails_at = "mined-2.jsonl"
    assert recipe.main(words) == 1
    assert "no space left" in capfd.readouterr().err
    assert stages.started == ["before.json", "mined-1.jsonl", "model-1", "mined-2.jsonl"]

    stages.started, stages.fails_at = [], None
    (output / "model-2").touch()  # of a training that was interrupted
    assert recipe.main([*words, "--max_failures", "3"]) == 0
    assert stages.resumes == [False, True]  # the first training says nothing of a run to continue
    assert stages.restarts == {0, 3}
    assert stages.started == ["mined-2.jsonl", "model-2", "model", "after.json"]
    output_text = capfd.readouterr().out
    assert "train-1  finished" in output_text and "train-2  pending" in output_text and "nDCG@10" in output_text

    stages.started = []
    assert recipe.main(words) == 0
    assert recipe.main([*words, "--seed", "1"]) == 2
    assert "stage mine-1 was finished there with seed 42, now it is 1" in capfd.readouterr().err
    assert not stages.started


def test_the_second_round_continues_with_the_first_rounds_model(recipe, data_flags, tiny_model, tmp_path):
    options = recipe.RecipeOptions(model_name_or_path=tiny_model, output_dir=str(tmp_path), **data_flags)
    stages = {stage.name: stage.flags for stage in recipe.chain(options)}
    assert list(stages) == ["before", "mine-1", "train-1", "mine-2", "train-2", "merge", "after"]
    first, second = (stages[f"train-{i}"]["output_dir"] for i in (1, 2))
    assert stages["mine-2"]["model_name_or_path"] == stages["train-2"]["model_name_or_path"] == first
    assert stages["train-2"]["train_data"] == stages["mine-2"]["output_file"]
    assert stages["merge"]["model_names_or_paths"] == [second, tiny_model]
    assert (
        stages["after"]["model_name_or_path"] == stages["merge"]["output_path"]
        and stages["before"]["model_name_or_path"] == tiny_model
    )


def test_invalid_flags_are_reported_before_the_first_stage(recipe, data_flags, tmp_path, capfd):
    words = argv({**data_flags, "model_name_or_path": make_tiny(tmp_path / "m"), "output_dir": str(tmp_path / "out")})
    assert recipe.main([*words, "--on_bad_rows", "keep"]) == 2
    assert "--on_bad_rows" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("groups", "batch"), [(5, 8), (100, 8), (700, 16), (2600, 64), (100_000, 256)])
def test_the_batch_of_the_recipe_follows_the_data(recipe, data_flags, tmp_path, monkeypatch, groups, batch):
    """An epoch has 40 updates or more where a batch of 8 allows it."""
    monkeypatch.setattr(recipe, "survey", lambda *_: SimpleNamespace(total_rows=groups))
    options = recipe.RecipeOptions(model_name_or_path="m", output_dir=str(tmp_path), **data_flags)
    assert recipe.global_batch(options) == batch
