"""Run of `raybge.demo`: text, mining, evaluation, fine-tuning, evaluation, comparison."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from raybge.cli.console import Console
from raybge.cli.options import DemoOptions
from raybge.cli.terminal import BOLD
from raybge.evaluation.metrics import METRICS
from raybge.quickstart.spec import DemoSpec
from raybge.util.plural import plural
from raybge.util.text_format import format_duration

SHOWN_METRICS = (*METRICS, "Recall@10")


def demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo.

    Args:
        options: flags of the command.
        console: output on the terminal.

    Returns:
        The content of summary.json: metrics before and after, and seconds per stage; {} for a dry run.
    """
    from raybge.evaluation.run import evaluate
    from raybge.mining.run import mine
    from raybge.quickstart import docstrings
    from raybge.training.run import train

    spec = DemoSpec.from_options(options)
    folder, text = spec.folder, spec.folder / "text"
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Any, *args: Any) -> Any:
        console.info(f"\n== {stage}", BOLD)
        start = time.monotonic()
        result = work(*args)
        seconds[stage] = round(time.monotonic() - start, 1)
        return result

    if spec.dry_run:
        console.info(f"would write docstrings to {text}, mine, train and evaluate with {spec.model}")
        return {}
    for old in ("text", "model"):
        shutil.rmtree(folder / old, ignore_errors=True)
    counts = timed("text", docstrings.write_data_set, text, spec.seed)
    console.info(
        f"{plural(counts['train'], 'training query')}, {plural(counts['dev'], 'held-out query')}, "
        f"{plural(counts['corpus'], 'passage')}"
    )
    with spec.scale.connect(console):
        timed("mine", mine, spec.mine, console)
        before = timed("evaluate before", evaluate, spec.before, console)
        timed("train", train, spec.train, console)
        after = timed("evaluate after", evaluate, spec.after, console)
    summary = {
        "before": {name: before.metrics[name] for name in SHOWN_METRICS},
        "after": {name: after.metrics[name] for name in SHOWN_METRICS},
        "seconds": seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_report(spec, summary, counts)
    _show(summary, folder, console)
    return summary


def _write_report(spec: DemoSpec, summary: dict[str, Any], counts: dict[str, int]) -> None:
    from raybge.evaluation.metric_changes import MetricChange
    from raybge.quickstart import page as report
    from raybge.report.page import REPORT, write_or_log
    from raybge.report.run_details import RunDetails

    labels = {"train": "training queries", "dev": "held-out queries", "corpus": "passages"}
    content = report.DemoReport(
        run=RunDetails("demo", dict(spec.flags), spec.model),
        changes=[MetricChange(name, summary["before"][name], summary["after"][name]) for name in SHOWN_METRICS],
        seconds=summary["seconds"],
        counts={name: counts[key] for key, name in labels.items()},
        reports=[("training", f"model/{REPORT}"), ("mining", f"text/mined.jsonl.{REPORT}")],
    )
    write_or_log(report.write, str(spec.folder / REPORT), lambda: content)


def _show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    from raybge.report.page import REPORT

    before, after = summary["before"], summary["after"]
    rows = [
        (name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{after[name] - before[name]:+.4f}")
        for name in SHOWN_METRICS
    ]
    console.info(f"\nheld-out queries, {format_duration(sum(summary['seconds'].values()))} in total")
    console.table(("", "before", "after", "difference"), rows)
    console.info(f"model: {folder / 'model'}\nwritten: {folder / 'summary.json'}\nreport: {folder / REPORT}")
