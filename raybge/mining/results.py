"""Results of a mining run next to its output: metadata, report and console summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from raybge.cli.console import Console
from raybge.data.survey import Survey
from raybge.evaluation.significance import LEVEL
from raybge.mining import page
from raybge.mining.cross_encoder import CrossEncoderScorer
from raybge.mining.relabelling import RelabelSpec, RelabelStatistics
from raybge.mining.sampling import SamplingSpec
from raybge.mining.spec import MiningSpec
from raybge.mining.statistics import MiningStatistics
from raybge.report.page import REPORT, write_or_log
from raybge.report.run_details import RunDetails, library_versions
from raybge.search.metadata import metadata_path, write_metadata
from raybge.util.filesystem import append_to_path
from raybge.util.plural import plural

MAX_EXAMPLE = 90  # characters of an example's text on the console
MAX_ABOVE = 0.01  # share of negatives above their positive from which on the console says what to do


@dataclass(frozen=True)
class MiningResult:
    """Result of `raybge.mine_hard_negatives`.

    Args:
        output_file: the groups with mined negatives; a dry run does not write it.
        report: the page next to it; None if this call wrote neither.
        counts: numbers of rows and passages: "rows", "bad_rows" and, unless `score_only`, "passages", "duplicates",
            "rows_filled" (with random passages) and "rows_with_fewer" (negatives than requested); with `rescore`
            "ranks_rescored" and "ranks_changed", which hold another passage by fp32 scores; with `relabel`
            "negatives_judged", "negatives_relabelled", "rows_relabelled", "rows_without_negatives" (all were taken for
            positives) and "rows_not_judged" (left as they were). Empty if the output file existed already.
        recall: share of the nearest passages that an approximate index finds; None for an exact search.
        seconds: duration of each stage.
    """

    output_file: str
    report: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    recall: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, output_file: str, summary: Mapping[str, Any]) -> Self:
        """Return the result of a run that wrote its output, or, without "seconds" in the summary, of a dry run."""
        return cls(
            output_file,
            report_path(output_file) if "seconds" in summary else None,
            {name: value for name, value in summary.items() if isinstance(value, int)},
            summary.get("recall"),
            summary.get("seconds", {}),
        )


def write_mining_metadata(
    spec: MiningSpec,
    embedder: str | None,
    scorer: CrossEncoderScorer | None,
    summary: Mapping[str, Any],
    statistics: MiningStatistics,
) -> None:
    """Write OUTPUT.meta.json. It is equal for two runs with equal outputs.

    Args:
        spec: the run.
        embedder: identity of the embedding model; None with `--score_only`.
        scorer: the cross-encoder.
        summary: counts of rows and passages.
        statistics: statistics of the rows.
    """
    write_metadata(
        spec.output.path,
        spec.options,
        {
            "embedder": embedder,
            "cross_encoder": scorer and scorer.identity,
            "counts": summary,
            "scores": statistics.histograms(),
            "versions": library_versions(),
        },
    )


def report_path(output_file: str) -> str:
    """Return the path of the report, next to the output."""
    return append_to_path(output_file, f".{REPORT}")


def write_report(
    spec: MiningSpec,
    surveys: Sequence[Survey],
    summary: Mapping[str, Any],
    statistics: MiningStatistics | None = None,
    sampling: SamplingSpec | None = None,
    relabelling: RelabelStatistics | None = None,
) -> None:
    """Write the report page.

    Args:
        spec: the run.
        surveys: surveys of the inputs.
        summary: counts and the seconds of each stage.
        statistics: statistics of the rows; None with `--score_only`.
        sampling: rules by which negatives were chosen.
        relabelling: counts and examples of `--relabel`.
    """

    def content() -> page.MiningReport:
        data = [item for survey in surveys for item in survey.rows_by_file().items()]
        model = spec.options["model_name_or_path"] or ""
        return page.MiningReport(
            run=RunDetails("mine", spec.flags, model, data, versions=library_versions()),
            statistics=statistics,
            number=spec.sampling.number,
            summary={name: value for name, value in summary.items() if isinstance(value, int)},
            seconds=summary["seconds"],
            sampling=sampling.describe() if sampling else "",
            scored_by="the cross-encoder" if spec.cross_encoder else "the model",
            outcome=spec.relabel.outcome if spec.relabel else "",
            relabelling=relabelling if spec.relabel else None,
        )

    write_or_log(page.write, report_path(spec.output.path), content)


def print_summary(
    summary: Mapping[str, Any],
    sampling: SamplingSpec,
    statistics: MiningStatistics,
    console: Console,
    relabel: RelabelSpec | None = None,
) -> None:
    """Print counts, the first rows and the output files.

    Args:
        summary: result of the command.
        sampling: rules by which negatives were chosen.
        statistics: statistics of the rows.
        console: the console.
        relabel: what became of negatives that were taken for positives.
    """
    most = "up to " if summary["rows_with_fewer"] else ""
    console.info(f"\n{plural(summary['rows'], 'row')} with {most}{plural(sampling.number, 'negative')} each")
    if summary["bad_rows"]:
        console.info(f"{plural(summary['bad_rows'], 'invalid row')} skipped")
    if summary["rows_filled"]:
        console.info(f"{plural(summary['rows_filled'], 'row')} completed with random passages")
    if summary["rows_with_fewer"]:
        reason = "the pool has no more passages"
        if sampling.by_score:
            reason = "neither the ranks nor random passages gave enough that satisfy the score limits"
        console.info(f"{plural(summary['rows_with_fewer'], 'row')} with fewer negatives: {reason}")
    if statistics.ranks_rescored:
        share = statistics.ranks_changed / statistics.ranks_rescored
        console.info(f"{share:.1%} of the {statistics.ranks_rescored:,} ranks hold another passage after --rescore")
    lines = relabelling_lines(relabel, statistics.relabelling) if relabel else above_positive_lines(statistics)
    for line in lines:
        console.info(line)
    width = min(MAX_EXAMPLE, console.columns - len(f"  {'query':<6} "))
    for example in statistics.examples:
        for name in ("query", "pos", "neg"):
            text = " ".join((example[name] if name != "neg" else next(iter(example["neg"]), "(none)")).split())
            console.info(f"  {name:<6} {text if len(text) <= width else text[: width - 3] + '...'}")
    output = summary["output_file"]
    console.info(f"written: {output}\nreport: {report_path(output)}")
    console.detail(f"written: {metadata_path(output)}")


def above_positive_lines(statistics: MiningStatistics) -> list[str]:
    """Return the lines on negatives that score above their positive, and on what to do; none without scores."""
    if not statistics.compared:
        return []
    share, (low, high) = statistics.above / statistics.compared, statistics.above_interval()
    interval = f"; {LEVEL:.0%} interval {low:.1%} to {high:.1%}" if low < high else ""
    line = (
        f"{share:.1%} of the negatives ({statistics.above:,} of {statistics.compared:,}{interval}) score above the "
        "best positive of their row"
    )
    if share < MAX_ABOVE:
        return [line]
    return [
        f"{line}: many of them may answer the query, and training would push them away",
        "--relative_margin 0.05 leaves them out; --range_for_sampling with a later first rank takes fewer of them; the "
        "report lists the most likely ones",
    ]


def relabelling_lines(relabel: RelabelSpec, statistics: RelabelStatistics) -> list[str]:
    """Return the lines on relabelled negatives, and on rows without a judgment.

    Args:
        relabel: what became of negatives that were taken for positives.
        statistics: the counts.

    Returns:
        The lines.
    """
    rows = plural(statistics.rows, "row")
    lines = [
        f"{plural(statistics.relabelled, 'negative')} of {statistics.judged:,} taken for positives and "
        f"{relabel.outcome}, in {rows}; {statistics.rows_without_negatives:,} of these have no negatives any more"
    ]
    if statistics.rows_failed:
        lines.append(
            f"{plural(statistics.rows_failed, 'row')} left as they were: the judge gave no usable answer, after all "
            "retries"
        )
    return lines
