"""Flags of a search that cannot be are named before anything is read, and what trials are told of the others."""

import json
from pathlib import Path

import pytest

from raybge.cli.console import Console
from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build
from raybge.cluster.resources import Cluster, Plan, side_by_side
from raybge.tune import main
from raybge.tuning import ray_tune as search_module
from raybge.tuning import run as tune_module
from raybge.tuning import spec as flags_module
from raybge.tuning.trial import Task
from raybge.util.errors import UserError


@pytest.fixture
def given(tiny_model, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune_module, "connect", lambda *given: pytest.fail("Ray was asked for"))
    rows = [{"query": f"q {i}", "pos": [f"p {i}"]} for i in range(40)]
    Path("groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": tiny_model, "train_data": "groups.jsonl", "output_dir": "out"}


def trial_flags(arguments: TuneOptions, plan: Plan, output: Path) -> dict:
    found = tune_module._survey(arguments, output, Console())
    return tune_module._trial_flags(arguments, found, plan, output, Console())


def argv(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"search": ["learning_rat=uniform(1,2)"]}, "learning_rate"),
        ({"search": ["learning_rate=loguniform(0,1)"]}, "^"),
        ({"search": ["temperature=uniform(0.1,0.9)"]}, "--search temperature=uniform(0.1,0.9): --temperature"),
        ({"search": ["train_group_size=choice(0,2)"]}, "--train_group_size must be at least 1, found 0"),
        ({"search": ["lr_scheduler_type=grid(linear,cosine)"], "search_alg": "optuna"}, "goes through no grid"),
        ({"search_alg": "optuna", "scheduler": "pbt"}, "--search_alg optuna learns from whole trials"),
        ({"search_alg": "hyperopt", "search": ["seed=grid(1,2)"]}, "hyperopt draws values and goes through no grid"),
        ({"search_alg": "bohb", "scheduler": "none"}, "--scheduler none: --search_alg bohb has its own way"),
        ({"search_alg": "bohb"}, "pip install hpbandster ConfigSpace"),
        ({"scheduler": "pbt", "search": ["seed=choice(1,2)"]}, "can search learning_rate, temperature, max_grad_norm"),
        ({"scheduler": "pbt", "save_only_model": True}, "--save_only_model: trials of this search pause"),
        ({"num_samples": 0}, "--num_samples must be at least 1, found 0"),
        ({"max_concurrent": 0}, "--max_concurrent must be at least 1, found 0"),
        ({"time_budget": 0}, "--time_budget must be above 0 seconds, found 0"),
        ({"held_out": 1}, "--held_out must be between 0 and 1, found 1"),
        ({"metric": "nDCG@100"}, "argument --metric: invalid choice"),
        ({"scheduler": "hyperband"}, "argument --scheduler: invalid choice"),
        ({"output_dir": "s3://bucket/search"}, "--output_dir s3://bucket/search: give a folder that all nodes share"),
        ({"num_sample": 3}, "did you mean --num_samples?"),
        ({"resume": True, "overwrite_output_dir": True}, "leave it out, or the other"),
    ],
)
def test_flags_that_cannot_be_are_named(given, capfd, flags, says, monkeypatch):
    if "pip install" in says:
        monkeypatch.setattr(search_module.importlib.util, "find_spec", lambda name: None)
    assert main(argv(given | flags)) == 2
    message = capfd.readouterr().err
    assert says in message and "Traceback" not in message
    assert not Path("out").exists()


def test_an_output_folder_that_is_not_empty_is_kept(given, capfd):
    Path("out").mkdir()
    Path("out/precious").touch()
    assert main(argv(given)) == 2
    assert "--overwrite_output_dir, or --resume" in capfd.readouterr().err
    assert main(argv(given | {"resume": True})) == 2
    assert "there is no search in it" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["train_data", "eval_data"])
def test_a_bad_row_is_named_before_ray_starts(given, capfd, flag):
    Path("bad.jsonl").write_text('{"query": "q", "pos": ["p"]}\n{"query": 3, "pos": ["p"]}\n')
    assert main(argv(given | {flag: "bad.jsonl"})) == 2
    assert 'bad.jsonl:2: "query" must be a non-empty string, found 3' in capfd.readouterr().err


def test_what_lies_beside_a_search_in_its_storage_path_stays(given, tmp_path):
    precious = tmp_path / "shared" / "search" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best.json", "trials.csv", "mine.txt"):
        (out / name).touch()
    arguments = build(TuneOptions, given | {"storage_path": str(tmp_path / "shared"), "overwrite_output_dir": True})
    tune_module._begin(arguments, {}, {}, out)
    assert precious.exists() and {path.name for path in out.iterdir()} == {"mine.txt", ".raybge"}


def test_a_finished_search_has_nothing_to_continue(given, capfd):
    Path("out/.raybge").mkdir(parents=True)
    Path("out/.raybge/search.json").write_text("{}")
    Path("out/best.json").write_text('{"flags": {}}')
    assert main(argv(given | {"resume": True})) == 0
    assert "is finished" in capfd.readouterr().out


def test_trials_are_told_what_was_given_and_read_it_from_anywhere(given, tmp_path, capfd):
    arguments = build(TuneOptions, given | {"num_samples": 3, "normalize_embeddings": False, "weight_decay": 0.1})
    flags = trial_flags(arguments, Plan(2, 1, 0), tmp_path / "out")
    trial = build(TrainOptions, {**flags, "output_dir": "x"})
    assert (
        not trial.normalize_embeddings
        and trial.training["weight_decay"] == 0.1
        and trial.training["eval_steps"] == 1 / 8
    )
    assert (trial.num_workers, trial.cpus_per_worker, trial.use_gpu) == ("2", 1, False)
    paths = [*trial.train_data, *trial.eval_data, *trial.eval_corpus]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths)
    assert "held out: " in capfd.readouterr().out

    own = given | {"eval_data": "groups.jsonl", "eval_strategy": "epoch", "save_strategy": "epoch"}
    flags = trial_flags(build(TuneOptions, own), Plan(1, 1, 0), tmp_path / "out")
    assert flags["eval_data"] == flags["train_data"] == [str(tmp_path / "groups.jsonl")]
    assert flags["eval_strategy"] == flags["save_strategy"] == "epoch" and "eval_corpus" not in flags

    flags = trial_flags(build(TuneOptions, given | {"scheduler": "pbt"}), Plan(1, 1, 0), tmp_path / "out")
    assert (flags["save_strategy"], flags["save_steps"], flags["eval_steps"]) == ("steps", 0.25, 0.25)


def test_a_search_that_is_continued_is_the_same(given, tmp_path):
    space = {}
    for resume, samples, says in ((False, 3, None), (True, 3, None), (True, 4, "--num_samples is 4, but 3 in")):
        arguments = build(TuneOptions, given | {"num_samples": samples, "resume": resume})
        if says:
            with pytest.raises(UserError, match=says):
                tune_module._begin(arguments, space, {"seed": 1, "token": "secret"}, tmp_path / "out")
        else:
            tune_module._begin(arguments, space, {"seed": 1, "token": "secret"}, tmp_path / "out")
    assert "secret" not in (tmp_path / "out" / ".raybge" / "search.json").read_text()


@pytest.mark.parametrize(
    ("cluster", "plan", "runs"),
    [
        (Cluster(True, 2, 0, 1, (2,), (0,)), Plan(1, 2, 0), 1),  # a laptop: one after the other
        (Cluster(True, 2, 0, 1, (2,), (0,)), Plan(1, 1, 0), 2),
        (Cluster(False, 8, 0, 1, (8,), (0,)), Plan(1, 2, 0), 2),  # 3 would leave 2 CPUs to read for 3 runs
        (Cluster(False, 32, 4, 2, (16, 16), (2, 2)), Plan(1, 4, 1), 4),
        (Cluster(False, 3, 0, 1, (3,), (0,)), Plan(2, 1, 0), 1),
    ],
)
def test_trials_never_take_the_cpus_that_read_for_them(cluster, plan, runs, monkeypatch):
    monkeypatch.setattr("raybge.cluster.resources.cores", lambda: 2)
    assert side_by_side(cluster, plan) == runs


def test_mining_and_its_flags_belong_to_a_trial(given, tmp_path, capfd):
    Path("mine.yaml").write_text("corpus_data: groups.jsonl\nnegative_number: 3\n")
    given |= {"mine_config": "mine.yaml"}
    search = ["range_for_sampling=choice(0-9,2-30)", "relative_margin=uniform(0,0.2)", "temperature=uniform(0.01,0.1)"]
    assert main(argv(given | {"search": ["range_for_sampling=choice(9-0,2-30)"]})) == 2
    assert "--search range_for_sampling=choice(9-0,2-30): --range_for_sampling takes" in capfd.readouterr().err
    Path("bad.yaml").write_text("output_file: x\n")
    assert main(argv(given | {"mine_config": "bad.yaml"})) == 2
    assert "--mine_config bad.yaml: output_file is the search's own" in capfd.readouterr().err

    arguments = build(TuneOptions, given | {"search": search})
    mining = flags_module.mining_of(arguments)
    space = tune_module.parse(search, flags_module.searched(mining))
    assert list(space) == ["range_for_sampling", "relative_margin", "temperature"]
    flags = trial_flags(arguments, Plan(1, 1, 0), tmp_path / "out")
    task = Task(flags, "x", 1, "", flags_module.trial_mining(mining, flags, tmp_path / "work"))
    drawn = {"range_for_sampling": "2-30", "relative_margin": 0.1, "temperature": 0.05}
    first, second = task.stages(drawn, "mined.jsonl", "model")
    assert (first["range_for_sampling"], first["relative_margin"], first["negative_number"]) == ("2-30", 0.1, 3)
    assert first["corpus_data"] == [str(tmp_path / "groups.jsonl")] and first["input_file"] == flags["train_data"]
    assert first["output_file"] == "mined.jsonl" and first["storage_path"] == str(tmp_path / "work")
    assert second["train_data"] == ["mined.jsonl"] and second["temperature"] == 0.05
    assert "range_for_sampling" not in second and "temperature" not in first
    mine, train = flags_module.commands(task, [(0, drawn)])
    assert mine[:3] == ["python", "-m", "raybge.mine"] and train[train.index("--train_data") + 1] == "MINED.jsonl"
