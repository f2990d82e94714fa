"""What a person looks at after mining: the report beside the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from raybge.mining.statistics import BIN, Suspect, Tally
from raybge.report.charts import short
from raybge.report.page import cell, cut, duration, page, section, table
from raybge.report.run_details import Run, heading, what_was_run
from raybge.report.series import Bars, histogram, legend
from raybge.util.atomic_write import written_aside


@dataclass(frozen=True)
class Mining:
    """All that the report says.

    Args:
        tally: what was counted of the rows; None where no negatives were chosen (--score_only).
        number: negatives that were asked for.
        summary: rows, passages, duplicates and bad_rows, as far as they are known.
        seconds: of each stage.
        sampling: how negatives were chosen.
        scored_by: "the cross-encoder" or "the model".
    """

    run: Run
    tally: Tally | None
    number: int = 0
    summary: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    sampling: str = ""
    scored_by: str = "the model"


def write(path: str, mining: Mining) -> None:
    """Write the report; a path or URI."""
    text = html(mining).encode()
    with written_aside(path, "--output_file") as out:
        out.write(text)


def html(mining: Mining) -> str:
    """The report as a document."""
    title = _title(mining)
    said = [f"{duration(sum(mining.seconds.values()))} in all"] if mining.seconds else []
    said += [mining.sampling] if mining.sampling else []
    top = heading(mining.run, title, said, _figures(mining))
    times = section("Time", "", _times(mining.seconds))
    tally = mining.tally
    if tally is None:
        return page(title, top, times, what_was_run(mining.run))
    return page(
        title,
        top,
        section("Scores", _scores_note(mining, tally), _scores(tally)),
        section("Ranks", _ranks_note(tally), histogram([Bars("negatives", tally.ranks, "r6")], 1, "rank")),
        section("Rows with fewer negatives", _counts_note(mining, tally), _counts(mining, tally)),
        section("Likeliest false negatives", _suspects_note(mining, tally), *map(_suspect, tally.suspects)),
        times,
        what_was_run(mining.run),
    )


def _title(mining: Mining) -> str:
    rows = mining.tally.rows if mining.tally else mining.summary.get("rows", 0)
    if mining.tally is None:
        return f"{rows:,} rows with scores"
    return f"{rows:,} row{'s' * (rows != 1)} with {mining.number} negative{'s' * (mining.number != 1)}"


def _figures(mining: Mining) -> list[tuple[str, str]]:
    names = {"passages": "passages", "duplicates": "duplicates dropped", "bad_rows": "bad rows left out"}
    found = [(said, f"{mining.summary[name]:,}") for name, said in names.items() if name in mining.summary]
    tally = mining.tally
    if tally:
        found += [("rows filled up at random", f"{tally.filled:,}"), ("rows with fewer", f"{tally.short:,}")]
    if tally and tally.compared:
        found.append(("negatives above their positive", f"{tally.above:,} ({_share(tally.above, tally.compared)})"))
    return found


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def _times(seconds: Mapping[str, float]) -> str:
    rows = [f"<tr>{cell(name)}{cell(duration(value), 'number')}</tr>" for name, value in seconds.items()]
    return table(["stage", "time"], rows, {"time"}) if rows else ""


# --- scores and ranks -------------------------------------------------------------------------------------------------


def _scores_note(mining: Mining, tally: Tally) -> str:
    known, negatives = sum(tally.positives.values()), sum(tally.negatives.values())
    note = f"By {mining.scored_by}: {known:,} positives and {negatives:,} chosen negatives, each kind's shares."
    if not known:
        note += " The pool has none of the positives: --keep_scores scores them too."
    chosen = sum(number * rows for number, rows in tally.counts.items())
    return note + (f" {chosen - negatives:,} negatives, random ones, were not scored." if chosen > negatives else "")


def _scores(tally: Tally) -> str:
    groups = [Bars("negatives", tally.negatives, "r6"), Bars("positives", tally.positives, "best")]
    drawn = histogram(groups, BIN, "score")
    return legend((each.class_, each.name) for each in reversed(groups) if each.total) + drawn if drawn else ""


def _ranks_note(tally: Tally) -> str:
    random = sum(number * rows for number, rows in tally.counts.items()) - tally.ranks.total()
    note = "The places of the chosen negatives among all passages for their query; 0 is the nearest."
    return note + (f" {random:,} more are random passages." if random else "")


# --- rows -------------------------------------------------------------------------------------------------------------


def _counts_note(mining: Mining, tally: Tally) -> str:
    return (
        f"{tally.short:,} of {tally.rows:,} rows have fewer than the {mining.number} that were asked for; "
        f"{tally.filled:,} were filled up with random passages."
    )


def _counts(mining: Mining, tally: Tally) -> str:
    if not tally.short:
        return "<p>Every row has as many as were asked for.</p>" if tally.rows else ""
    few = [(number, rows) for number, rows in sorted(tally.counts.items()) if number < mining.number]
    body = [
        f"<tr>{cell(str(number), 'number')}{cell(f'{rows:,}', 'number')}{cell(_share(rows, tally.rows), 'number')}</tr>"
        for number, rows in few
    ]
    return table(["negatives", "rows", "share"], body, {"negatives", "rows", "share"})


def _suspects_note(mining: Mining, tally: Tally) -> str:
    return (
        f"Negatives that score highest beside their row's best positive, by {mining.scored_by}, one of a row: "
        f"look whether they answer the query after all. {tally.above:,} of {tally.compared:,} negatives score above "
        "their positive; --relative_margin or --absolute_margin keeps such ones away."
    )


def _suspect(suspect: Suspect) -> str:
    scores = f"{short(suspect.negative_score)} beside {short(suspect.positive_score)}"
    texts = (("positive", suspect.positive), ("negative", suspect.negative))
    sides = "".join(f"<div><h4>{name}</h4><p>{escape(cut(text))}</p></div>" for name, text in texts)
    return (
        f'<article class="query"><h3>{escape(cut(suspect.query))}</h3>'
        f'<p class="note"><span class="gain">{suspect.gap:+.4f}</span> · {scores}</p>'
        f'<div class="sides">{sides}</div></article>'
    )
