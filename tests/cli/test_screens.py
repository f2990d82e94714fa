"""Screens of the commands at three widths and in a file, compared with those in tests/cli/screens.

The commands' own functions write their lines, bars and tables, on small made-up results; time is frozen between steps.
After a change that is meant, look at the screens that `UPDATE_SCREENS=1 pytest tests/cli/test_screens.py` writes.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from screens import console_on, write_model

from raybge.cli.options import EncodeOptions, MineOptions, PretrainOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.cluster.resources import Cluster, Plan
from raybge.diagnostics.machine_checks import CheckFailedError, NeedsGpuError
from raybge.diagnostics.run import run_checks
from raybge.encoding import run as encoding_run
from raybge.encoding.spec import EncodingSpec
from raybge.evaluation import run as evaluation_run
from raybge.evaluation import significance
from raybge.evaluation.judgments import ModelMetrics
from raybge.evaluation.metric_changes import METRIC_CHANGES, MetricChange, to_json
from raybge.evaluation.retrieval import _print_plan as print_evaluation_plan
from raybge.merging import run as merging_run
from raybge.mining import run as mining_run
from raybge.mining.results import print_summary
from raybge.mining.spec import MiningSpec
from raybge.mining.statistics import MiningStatistics
from raybge.model.spec import EncoderSpec
from raybge.quickstart.run import _show as show_demo
from raybge.search.memory import SearchMemory
from raybge.search.pipeline import LOADING
from raybge.search.spec import OutputSpec
from raybge.search.stage_clock import StageClock
from raybge.search.store import run_store
from raybge.training import run as training_run
from raybge.training.controller import STARTING_WORKERS, _evaluation_line, _update_bar
from raybge.training.health.run_state import Progress
from raybge.training.spec import TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.pretrain_spec import PretrainSpec
from raybge.training.worker_config import PlannedRun, TrialContext
from raybge.tuning import run as tuning_run
from raybge.tuning.records import Trial
from raybge.tuning.search_space import Domain
from raybge.tuning.tuning_results import _trial_line
from raybge.util.activity import STARTING, Activity

STORED = Path(__file__).parent / "screens"
CLUSTER, PLAN = Cluster(True, 4, 0, 1, (4,), (0,), memory=8 << 30), Plan(2, 2, 0)
MODEL = "model"  # a link to the tiny model, in the current folder
LONG = "models/a-base-model-with-a-long-name"


def survey(rows, name="data.jsonl"):
    return SimpleNamespace(total_rows=rows, files=[SimpleNamespace(name=name)], rows=np.array([rows]), bad_count=0)


def search_data(queries, passages, duplicates):
    return SimpleNamespace(
        queries=SimpleNamespace(survey=survey(queries), shared_positives=None),
        unique=SimpleNamespace(passages=passages, duplicates=duplicates, unique_B=np.array([passages])),
        texts=queries + passages,
    )


def start_ray(console, screen, clock):
    with console.phase("starting Ray"):
        clock.wait(4)
        console._on_change()
        screen.snapshot("Ray starts")


def stages(console, clock, *counts):
    """Return the clock of these stages: name, amount, unit, seconds."""
    stage_clock = StageClock()
    for name, amount, unit, seconds in counts:
        stage_clock.seconds[name] = seconds
        stage_clock.count(name, amount, unit)
    return stage_clock


def encode_texts(console, screen, clock, total):
    """Two blocks of texts; the first took 10 of the 22 seconds until it arrived."""
    with console.bar("encode", total, "text", start_up=LOADING) as bar:
        clock.wait(12)
        console._on_change()
        screen.snapshot("the model is loaded")
        clock.wait(10)
        bar.update(total // 4, 10.0)
        screen.snapshot("a part is encoded")
        clock.wait(30)
        bar.update(total - total // 4, 10.0)


# --- commands ---------------------------------------------------------------------------------------------------------


def mine(console, screen, clock):
    flags = dict(model_name_or_path=MODEL, input_file="groups.jsonl", output_file="mined.jsonl", keep_scores=True)
    spec = MiningSpec.from_options(build_options(MineOptions, {**flags, "negative_number": 7}))
    spec = replace(spec, model=replace(spec.model, model_name_or_path=MODEL))  # its absolute path is a temporary one
    data, sampling = search_data(2000, 8000, 1), spec.sampling
    start_ray(console, screen, clock)
    memory = SearchMemory.plan(spec.index, CLUSTER, PLAN, 8000, 32)
    mining_run._print_plan(SimpleNamespace(spec=spec, index=spec.index, console=console), data, memory, sampling)
    encode_texts(console, screen, clock, data.texts)
    stages(console, clock, ("encode", 10_000, "text", 52.0), ("search", 2000, "row", 3.25)).report(console)
    statistics = MiningStatistics(
        rows=2000, above_by_row=Counter({(0, 7): 1200, (1, 7): 500, (6, 7): 300}), examples=[EXAMPLE]
    )
    summary = {"rows": 2000, "bad_rows": 1, "rows_filled": 0, "rows_with_fewer": 12, "output_file": "mined.jsonl"}
    print_summary(summary, sampling, statistics, console)
    screen.snapshot("the end")


EXAMPLE = {
    "query": "how do plants make food",
    "pos": "Photosynthesis turns light, water and carbon dioxide into sugar, which feed the plant and all that eat it.",
    "neg": ["Plants need water."],
}


def interrupted_mining(console, screen, clock):
    with pytest.raises(KeyboardInterrupt), run_store(OutputSpec("mined.jsonl"), "mine", False, console) as store:
        store.keep_on_failure = True
        with console.bar("encode", 10_000, "text", start_up=LOADING) as bar:
            store.write_arrays("block", x=np.zeros(1))
            clock.wait(12)
            bar.update(2500, 10.0)
            raise KeyboardInterrupt
    console.error("raybge.mine: interrupted")
    screen.snapshot("Ctrl-C")


def plan_training(options, task, console):
    """Print the plan, from real rows."""
    options = build_options(options, dict(model_name_or_path=MODEL, train_data="train.jsonl", output_dir="runs/new"))
    spec = TrainingSpec.from_options(options, task)
    files = training_run_files(spec)
    rows = training_run._survey(spec, files, console)
    data = spec.data.arrange(rows, 8, PLAN.workers)
    console.info(f"cluster: {CLUSTER.describe()}; {PLAN.describe('training worker')}")
    for line in training_run._description(PlannedRun(spec, data, PLAN, 1.0, None, TrialContext())):
        console.info(line)
    identity = SimpleNamespace(gradient_accumulation_steps=1)
    return spec, SimpleNamespace(order=data.order, identity=identity)


def training_run_files(spec):
    from raybge.data.source_files import list_files

    return list_files(spec.data.train_data, "--train_data", spec.data.any_text)


def train(console, screen, clock):
    start_ray(console, screen, clock)
    spec, config = plan_training(TrainOptions, FinetuneSpec, console)
    first, second = {"nDCG@10": 0.41, "MRR@10": 0.35}, {"nDCG@10": 0.47, "MRR@10": 0.345}
    progress = Progress()
    with console.bar("train", None, "group", start_up=STARTING_WORKERS) as bar:

        def show(heading, seconds, activity=("step 1", ""), **changes):
            clock.wait(seconds)
            for name, value in changes.items():
                setattr(progress, name, value)
            progress.activity = Activity(activity[0], 0.0, 0, phase=activity[1])
            _update_bar(progress, config, bar)
            clock.wait(3)
            console._on_change()
            screen.snapshot(heading)

        show("workers start", 3, (STARTING, "loading the model"))
        clock.wait(6)
        show("evaluation before training", 2, (STARTING, "evaluating before training"), total=25, started_at=0)
        progress.evaluations.append((0, first))
        console.info(_evaluation_line(0, first, progress))
        show("the first step", 5, evaluation_seconds=5.0)
        show("training", 20, step=10, loss=0.6123)
        show("evaluation", 10, ("an evaluation", "evaluating"), step=15, loss=0.5)
        progress.evaluations.append((15, second))
        console.info(_evaluation_line(15, second, progress))
        show("writing", 30, ("the end of step 25", "writing the model"), step=25)
    changes = [MetricChange("nDCG@10", 0.41, 0.48, 0.032, 0.108, 200), MetricChange("MRR@10", 0.35, 0.34, -0.04, 0.02)]
    results = {"steps": 25, "train_runtime": 75.0, "train_samples_per_second": 2.6, "train_loss": 0.4321}
    write_model("runs/new")
    training_run._summarize(spec, {**results, METRIC_CHANGES: to_json(changes)}, console)
    screen.snapshot("the end")


def pretrain(console, screen, clock):
    spec, config = plan_training(PretrainOptions, PretrainSpec, console)
    with console.bar("train", None, "text", start_up=STARTING_WORKERS) as bar:
        for seconds, step in ((9, 0), (40, 1)):
            clock.wait(seconds)
            activity = Activity("step 1", 0.0, 0)
            _update_bar(Progress(total=25, step=step, started_at=0, loss=7.5, activity=activity), config, bar)
        screen.snapshot("training")
    results = {"steps": 1, "train_runtime": 41.0, "train_samples_per_second": 0.2, "train_loss": 7.5}
    write_model("runs/new/encoder_model")
    training_run._summarize(spec, results, console)
    screen.snapshot("the end")


def evaluate(console, screen, clock):
    data, index = search_data(323, 3633, 0), SimpleNamespace(shard_size=1 << 20)
    models = [SimpleNamespace(name=name) for name in ("runs/mine", f"{LONG}-1", f"{LONG}-2")]
    spec = SimpleNamespace(ranking=SimpleNamespace(k=100, depth=100), index=index, models=models, model=models[0])
    print_evaluation_plan(spec, EncoderSpec(MODEL), data, SearchMemory(3633, 3633, 1, 2, 32), console)
    encode_texts(console, screen, clock, data.texts)
    stages(console, clock, ("encode", data.texts, "text", 52.0), ("search", 323, "query", 0.5)).report(console)
    random = np.random.default_rng(1)
    names = [f"{kind}@{k}" for kind in ("nDCG", "MRR", "Recall") for k in (1, 10, 100)]
    first, *others = ({name: np.float32(random.integers(0, best, 323) / 10) for name in names} for best in (11, 9, 11))
    results = [
        ModelMetrics(
            {**{name: float(value_Q.mean(dtype=np.float64)) for name, value_Q in values.items()}, **COUNTS}, values
        )
        for values in (first, *others)
    ]
    evaluation_run._print_metrics(spec, results[0], console)
    evaluation_run._compare_models(spec, results, console)
    screen.snapshot("the end")


COUNTS = {"queries": 323, "corpus": 3633}


def encode(console, screen, clock):
    options = build_options(EncodeOptions, dict(model_name_or_path=MODEL, input_file="t.jsonl", output_file="t.npy"))
    spec = EncodingSpec.from_options(options)
    spec = replace(spec, model=replace(spec.model, model_name_or_path=MODEL))
    encoding_run._print_plan(spec, survey(1), 1, console)
    with console.bar("write", 1, "row"):
        screen.snapshot("writing")
    stages(console, clock, ("encode", 1, "text", 4.0), ("write", 1, "row", 0.1)).report(console)
    encoding_run._print_result("t.npy", survey(1), SimpleNamespace(packed_width=32, dtype="float32"), console)
    screen.snapshot("the end")


def merge(console, screen, clock):
    spec = SimpleNamespace(names=["runs/mine", f"{LONG}-with-an-even-longer-name-of-a-folder"], method="linear")
    settings = SimpleNamespace(pooling="cls", normalize=True, prompts={})
    models = [SimpleNamespace(config={"model_type": "bert"}, settings=settings) for _ in spec.names]
    aligned = SimpleNamespace(settings=settings, models=models, tensors=range(199), bytes=133e6)
    merging_run._print_plan(spec, aligned, console)
    with console.bar("merge", 199, "tensor") as bar:
        clock.wait(5)
        bar.update(99)
        screen.snapshot("merging")
    merging_run._print_weights(spec, SimpleNamespace(weights=[0.7, 0.3], losses=[0.2, 0.4]), console)
    screen.snapshot("the end")


def tune(console, screen, clock):
    space = {"learning_rate": Domain("loguniform", (1e-6, 1e-4)), "temperature": Domain("uniform", (0.01, 0.1))}
    search = SimpleNamespace(
        space=space, metric="nDCG@10", mode="max", num_samples=8, algorithm="optuna", scheduler="asha"
    )
    tuning_run._print_plan(SimpleNamespace(search=search), CLUSTER, PLAN, 2, console)
    flags = {"learning_rate": 2.345e-5, "temperature": 0.0213}
    with console.bar("search", 8, "trial") as bar:
        clock.wait(1200)
        for number, status in ((1, "finished"), (2, "failed")):
            curve = [(120, 0.4)] if number == 1 else []
            error = None if curve else "UserError: step 7: the loss is not finite, so training has diverged"
            trial = Trial(number, flags, status, curve, dict.fromkeys(["nDCG@10"][: len(curve)], 0.4), 612.0, error)
            console.message(_trial_line(trial, "nDCG@10"))
            bar.update(1)
        screen.snapshot("two of eight trials")


def selftest(console, screen, clock):
    def equal_gradients(device):
        return "largest difference 2e-07"

    def packed_attention(device):
        raise NeedsGpuError("kernels of a GPU")

    def half_precision(device):
        raise CheckFailedError("difference 0.3, at most 0.01")

    run_checks([equal_gradients, packed_attention, half_precision], torch.device("cpu"), console)
    screen.snapshot("the end")


def demo(console, screen, clock):
    metrics = {
        "before": dict.fromkeys(("nDCG@10", "MRR@10", "Recall@10"), 0.5),
        "seconds": {"mine": 100.0, "train": 265.0},
    }
    show_demo({**metrics, "after": {**metrics["before"], "nDCG@10": 0.55}}, Path("runs/demo"), console)
    screen.snapshot("the end")


COMMANDS = (mine, interrupted_mining, train, pretrain, evaluate, encode, merge, tune, selftest, demo)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """The current folder, with a model and rows; intervals are of few samples."""
    monkeypatch.setattr(significance, "SAMPLES", 100)
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny_model, MODEL)
    for name in ("groups.jsonl", "train.jsonl", "t.jsonl"):
        Path(name).write_text('{"query": "ak", "pos": ["bl"], "neg": ["cm"], "text": "dn"}\n' * 200)


@pytest.mark.parametrize("columns", [80, 100, 140, 0], ids=lambda columns: f"{columns}" if columns else "file")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_screens_equal_the_stored_ones(command, columns, folder, monkeypatch):
    with console_on(columns, monkeypatch) as (console, screen, clock):
        command(console, screen, clock)
        text = screen.text
    assert all(len(line) <= (columns or 240) for line in text.splitlines())
    stored = STORED / f"{command.__name__}-{columns or 'file'}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        STORED.mkdir(exist_ok=True)
        stored.write_text(text, encoding="utf-8")
    assert text == stored.read_text(encoding="utf-8")


def lines_and_bar(console, clock):
    console.table(("metric", "verdict"), [("nDCG@10", "better")])
    with console.bar("encode", 10, "text") as bar:
        clock.wait(5)
        bar.update(5)
    console.error("raybge.work: wrong")


@pytest.mark.parametrize(
    ("columns", "variables", "colored", "rewritten"),
    [
        (100, {}, True, True),
        (100, {"NO_COLOR": "1"}, False, True),
        (100, {"TERM": "dumb"}, False, False),
        (0, {}, False, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "file"],
)
def test_colors_and_cursor_control(columns, variables, colored, rewritten, monkeypatch):
    with console_on(columns, monkeypatch) as (console, screen, clock):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        lines_and_bar(console, clock)
        screen.snapshot("the end")
        written = screen.written.replace(b"\x1b]2;", b"")  # the snapshot's own mark
    assert (b"better\x1b[0m" in written and b"\x1b[31mraybge.work: wrong" in written) == colored
    assert (b"\x1b[K" in written) == rewritten and (b"\x1b" in written) == (colored or rewritten)
