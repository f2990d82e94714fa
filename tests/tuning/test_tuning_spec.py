"""Flags of a search: errors before anything is read, the flags of trials, and continuing a search."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from raybge.cli.console import Console
from raybge.cli.options import TrainOptions, TuneOptions
from raybge.cli.parser import build_options
from raybge.cluster.resources import Cluster, Plan, concurrent_runs
from raybge.tune import main
from raybge.tuning import run as run_module
from raybge.tuning import spec as spec_module
from raybge.tuning.command_lines import reproduction_commands
from raybge.tuning.spec import TuningSpec
from raybge.tuning.trial_spec import TrialSpec, mining_flags
from raybge.util.errors import UserError


@pytest.fixture
def base_flags(tiny_model, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    rows = [{"query": f"q {i}", "pos": [f"p {i}"]} for i in range(40)]
    Path("groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": tiny_model, "train_data": "groups.jsonl", "output_dir": "out"}


def make_spec(flags: dict) -> TuningSpec:
    return TuningSpec.from_options(build_options(TuneOptions, flags))


def trial_flags(spec: TuningSpec, plan: Plan) -> dict:
    return run_module._trial_flags(spec, run_module._survey(spec, Console()), plan, Console())


def argv(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"search": ["learning_rat=uniform(1,2)"]}, "learning_rate"),
        ({"batch_by": "similarity", "batch_vectors": "q.npy"}, "on a part of them: give --eval_data too"),
        ({"search": ["batch_vectors=choice('a','b')"]}, "it is a path"),
        ({"search": ["learning_rate=loguniform(0,1)"]}, "^"),
        ({"search": ["temperature=uniform(0.1,0.9)"]}, "--search temperature=uniform(0.1,0.9): --temperature"),
        ({"search": ["train_group_size=choice(0,2)"]}, "--train_group_size must be at least 1, found 0"),
        ({"search": ["lr_scheduler_type=grid(linear,cosine)"], "search_alg": "optuna"}, "does not support grids"),
        ({"search_alg": "optuna", "scheduler": "pbt"}, "--search_alg optuna learns from completed trials"),
        (
            {"search_alg": "hyperopt", "search": ["seed=grid(1,2)"]},
            "hyperopt samples values and does not support grids",
        ),
        ({"search_alg": "bohb", "scheduler": "none"}, "--scheduler none: --search_alg bohb has its own early stopping"),
        ({"search_alg": "bohb"}, "pip install hpbandster ConfigSpace"),
        ({"scheduler": "pbt", "search": ["seed=choice(1,2)"]}, "can search learning_rate, temperature, max_grad_norm"),
        ({"scheduler": "pbt", "save_only_model": True}, "--save_only_model: trials of this search pause"),
        ({"num_samples": 0}, "--num_samples must be at least 1, found 0"),
        ({"max_concurrent": 0}, "--max_concurrent must be at least 1, found 0"),
        ({"time_budget": 0}, "--time_budget must be above 0 seconds, found 0"),
        ({"held_out": 1}, "--held_out must be between 0 and 1, found 1"),
        ({"metric": "nDCG@100"}, "argument --metric: invalid choice"),
        ({"scheduler": "hyperband"}, "argument --scheduler: invalid choice"),
        ({"output_dir": "s3://bucket/search"}, "--output_dir s3://bucket/search: URIs are not supported here"),
        ({"num_sample": 3}, "did you mean --num_samples?"),
        ({"resume": True, "overwrite_output_dir": True}, "use only one of them"),
    ],
)
def test_invalid_flags_are_errors(base_flags, capfd, flags, message, monkeypatch):
    if "pip install" in message:
        monkeypatch.setattr(spec_module.importlib.util, "find_spec", lambda name: None)
    assert main(argv(base_flags | flags)) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("out").exists()


def test_output_folder_that_is_not_empty_is_preserved(base_flags, capfd):
    Path("out").mkdir()
    Path("out/precious").touch()
    assert main(argv(base_flags)) == 2
    assert "--overwrite_output_dir, or --resume" in capfd.readouterr().err
    assert main(argv(base_flags | {"resume": True})) == 2
    assert "contains no search to continue" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["train_data", "eval_data"])
def test_invalid_row_is_reported_before_ray_starts(base_flags, capfd, flag):
    Path("bad.jsonl").write_text('{"query": "q", "pos": ["p"]}\n{"query": 3, "pos": ["p"]}\n')
    assert main(argv(base_flags | {flag: "bad.jsonl"})) == 2
    assert 'bad.jsonl:2: "query" must be a non-empty string, found 3' in capfd.readouterr().err


def test_other_files_in_output_and_storage_path_are_preserved(base_flags, tmp_path):
    precious = tmp_path / "shared" / "search" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best.json", "trials.csv", "mine.txt"):
        (out / name).touch()
    spec = make_spec(base_flags | {"storage_path": str(tmp_path / "shared"), "overwrite_output_dir": True})
    run_module.prepare_output(spec.output, spec.resume, run_module.search_identity({}, {}, {}))
    assert precious.exists() and {path.name for path in out.iterdir()} == {"mine.txt", ".raybge"}


def test_finished_search_has_nothing_to_continue(base_flags, capfd):
    Path("out/.raybge").mkdir(parents=True)
    Path("out/.raybge/search.json").write_text("{}")
    Path("out/best.json").write_text('{"flags": {}}')
    assert main(argv(base_flags | {"resume": True})) == 0
    assert "is finished" in capfd.readouterr().out


def test_trials_have_the_given_flags_with_absolute_paths(base_flags, tmp_path, capfd):
    changed = {"num_samples": 3, "normalize_embeddings": False, "weight_decay": 0.1}
    flags = trial_flags(make_spec(base_flags | changed), Plan(2, 1, 0))
    trial = build_options(TrainOptions, {**flags, "output_dir": "x"})
    assert (
        not trial.normalize_embeddings
        and trial.training["weight_decay"] == 0.1
        and trial.training["eval_steps"] == 1 / 8
    )
    assert (trial.num_workers, trial.cpus_per_worker, trial.use_gpu) == ("2", 1, False)
    paths = [*trial.train_data, *trial.eval_data, *trial.eval_corpus]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths)
    assert "held out: " in capfd.readouterr().out

    changed = {"eval_data": "groups.jsonl", "eval_strategy": "epoch", "save_strategy": "epoch"}
    changed |= {"cache_path": "new/cache", "logging_dir": "new/logs"}
    flags = trial_flags(make_spec(base_flags | changed), Plan(1, 1, 0))
    assert flags["eval_data"] == flags["train_data"] == [str(tmp_path / "groups.jsonl")]
    assert [flags[name] for name in ("cache_path", "logging_dir")] == [f"{tmp_path}/new/cache", f"{tmp_path}/new/logs"]
    assert flags["eval_strategy"] == flags["save_strategy"] == "epoch" and "eval_corpus" not in flags

    flags = trial_flags(make_spec(base_flags | {"scheduler": "pbt"}), Plan(1, 1, 0))
    assert (flags["save_strategy"], flags["save_steps"], flags["eval_steps"]) == ("steps", 0.25, 0.25)


def test_continued_search_must_have_equal_settings(base_flags, tmp_path):
    for resume, samples, message in ((False, 3, None), (True, 3, None), (True, 4, "--num_samples is 4, but 3 in")):
        spec = make_spec(base_flags | {"num_samples": samples, "resume": resume})
        identity = run_module.search_identity({}, spec.settings, {"seed": 1, "token": "secret"})
        with pytest.raises(UserError, match=message) if message else nullcontext():
            run_module.prepare_output(spec.output, resume, identity)
    assert "secret" not in (tmp_path / "out" / ".raybge" / "search.json").read_text()


@pytest.mark.parametrize(
    ("cluster", "plan", "runs"),
    [
        (Cluster(True, 2, 0, 1, (2,), (0,)), Plan(1, 2, 0), 1),  # a laptop: one at a time
        (Cluster(True, 2, 0, 1, (2,), (0,)), Plan(1, 1, 0), 2),
        (Cluster(False, 8, 0, 1, (8,), (0,)), Plan(1, 2, 0), 2),  # 3 would leave 2 CPUs for reading of 3 runs
        (Cluster(False, 32, 4, 2, (16, 16), (2, 2)), Plan(1, 4, 1), 4),
        (Cluster(False, 3, 0, 1, (3,), (0,)), Plan(2, 1, 0), 1),
    ],
)
def test_trials_leave_cpus_for_reading(cluster, plan, runs, monkeypatch):
    monkeypatch.setattr("raybge.cluster.resources.available_cores", lambda: 2)
    assert concurrent_runs(cluster, plan) == runs


def test_trials_mine_with_searched_flags(base_flags, tmp_path, capfd):
    Path("mine.yaml").write_text("candidate_pool: groups.jsonl\nnegative_number: 3\n")
    base_flags |= {"mine_config": "mine.yaml"}
    search = ["range_for_sampling=choice(0-9,2-30)", "relative_margin=uniform(0,0.2)", "temperature=uniform(0.01,0.1)"]
    assert main(argv(base_flags | {"search": ["range_for_sampling=choice(9-0,2-30)"]})) == 2
    assert "--search range_for_sampling=choice(9-0,2-30): --range_for_sampling takes" in capfd.readouterr().err
    Path("bad.yaml").write_text("output_file: x\n")
    assert main(argv(base_flags | {"mine_config": "bad.yaml"})) == 2
    assert "--mine_config bad.yaml: output_file is determined by the search" in capfd.readouterr().err

    spec = make_spec(base_flags | {"search": search, "storage_path": str(tmp_path / "work")})
    assert list(spec.search.space) == ["range_for_sampling", "relative_margin", "temperature"]
    flags = trial_flags(spec, Plan(1, 1, 0))
    trial_spec = TrialSpec(flags, "x", 1, "", mining_flags(spec, flags))
    hyperparameters = {"range_for_sampling": "2-30", "relative_margin": 0.1, "temperature": 0.05}
    mining, training = trial_spec.stage_flags(hyperparameters, "mined.jsonl", "model")
    assert (mining["range_for_sampling"], mining["relative_margin"], mining["negative_number"]) == ("2-30", 0.1, 3)
    assert mining["corpus_data"] == [str(tmp_path / "groups.jsonl")] and mining["input_file"] == flags["train_data"]
    assert mining["output_file"] == "mined.jsonl" and mining["storage_path"] == str(tmp_path / "work")
    assert training["train_data"] == ["mined.jsonl"] and training["temperature"] == 0.05
    assert "range_for_sampling" not in training and "temperature" not in mining
    mine, train = reproduction_commands(trial_spec, [(0, hyperparameters)])
    assert mine[:3] == ["python", "-m", "raybge.mine"] and train[train.index("--train_data") + 1] == "MINED.jsonl"


@pytest.mark.parametrize(
    ("spelling", "stage", "name"),
    [
        ("passage_max_len", "train", "passage_max_len"),
        ("mine.passage_max_len", "mine", "passage_max_len"),
        ("embedder_passage_max_length", "mine", "passage_max_len"),  # FlagEmbedding's name in its mining script
        ("mine.seed", "mine", "seed"),
        ("seed", "train", "seed"),
        ("negative_number", "mine", "negative_number"),
    ],
)
def test_a_searched_flag_reaches_the_stage_that_it_names(base_flags, spelling, stage, name):
    Path("mine.yaml").write_text("corpus_data: groups.jsonl\n")
    spec = make_spec(base_flags | {"mine_config": "mine.yaml", "search": [f"{spelling}=choice(5,6)"]})
    (searched,) = spec.search.space
    flags = trial_flags(spec, Plan(1, 1, 0))
    trial_spec = TrialSpec(flags, "x", 1, "", mining_flags(spec, flags))
    stages = [
        dict(zip(("mine", "train"), trial_spec.stage_flags({searched: value}, "m", "o"), strict=True))
        for value in (5, 6)
    ]
    assert [each[stage][name] for each in stages] == [5, 6]
    other = "train" if stage == "mine" else "mine"
    assert stages[0][other] == stages[1][other]


def test_without_mining_the_prefix_is_unknown(base_flags, capfd):
    assert main(argv(base_flags | {"search": ["mine.seed=choice(1,2)"]})) == 2
    assert "there is no flag mine.seed" in capfd.readouterr().err
