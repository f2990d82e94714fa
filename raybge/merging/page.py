"""What a person looks at after models were mixed: `report.html` in the mixture's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raybge.evaluation.metric_changes import number
from raybge.merging.coefficient_search import Tasted
from raybge.report.charts import (
    Frame,
    Scale,
    bottom_axis,
    clipped,
    left_axis,
    line,
    mark,
    rounded_out,
    svg,
    told_apart,
    words,
)
from raybge.report.page import cell, chart, duration, page, section, table
from raybge.report.run_details import Run, heading, what_was_run
from raybge.report.series import NARROW, TICKS, WIDE
from raybge.util.atomic_write import written_aside

NAME = 40  # characters of a model's name in a chart and in the heads of a table


@dataclass(frozen=True)
class Merging:
    """All that the report says.

    Args:
        models, weights: of the mixture, one weight for each model.
        method: how they were mixed.
        losses: of each model on the examples; none where weights come from elsewhere.
        tasted: the mixtures that a search measured, in its order; none where it was none.
        least: what the search asked of the general set, None without one.
        metric: what was measured.
    """

    run: Run
    models: Sequence[str]
    weights: Sequence[float]
    method: str = "linear"
    losses: Sequence[float] = ()
    tasted: Sequence[Tasted] = ()
    least: float | None = None
    metric: str = "nDCG@10"
    seconds: float = 0.0

    @property
    def chosen(self) -> Tasted | None:
        """The mixture that was taken, of those that were measured."""
        return next((each for each in self.tasted if list(each.weights) == list(self.weights)), None)


def write(path: str, merging: Merging) -> None:
    """Write the report; a path or URI."""
    text = html(merging).encode()
    with written_aside(path, "--output_path") as out:
        out.write(text)


def html(merging: Merging) -> str:
    """The report as a document."""
    title = f"{len(merging.models)} models mixed"
    said = [f"by {merging.method}", f"{duration(merging.seconds)} in all"]
    figures = []
    if chosen := merging.chosen:
        figures.append((f"{merging.metric} on the target", number(chosen.target)))
        figures += [] if chosen.general is None else [(f"{merging.metric} on the general set", number(chosen.general))]
        figures.append(("mixtures measured", f"{len(merging.tasted):,}"))
    return page(
        title,
        heading(merging.run, title, said, figures),
        section("Weights", _weights_note(merging), _weights(merging)),
        section("Target against general", _tradeoff_note(merging), _tradeoff(merging)),
        section("Mixtures", "All that were measured, the best on the target first.", _mixtures(merging)),
        what_was_run(merging.run),
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights_note(merging: Merging) -> str:
    if merging.losses:
        return "Each follows from the model's loss on the examples: softmax(-loss / temperature)."
    return "Found by a search." if merging.tasted else "As they were given."


def _weights(merging: Merging) -> str:
    heads = ["model", "weight", *(["loss"] if merging.losses else [])]
    rows = []
    for i, (model, weight) in enumerate(zip(merging.models, merging.weights, strict=True)):
        numbers = [weight, *([merging.losses[i]] if merging.losses else [])]
        rows.append(f"<tr>{cell(model, 'text')}{''.join(cell(number(each), 'number') for each in numbers)}</tr>")
    return table(heads, rows, set(heads[1:]))


def _mixtures(merging: Merging) -> str:
    if not merging.tasted:
        return ""
    second = any(each.general is not None for each in merging.tasted)
    names = [f"weight of {name}" for name in told_apart(merging.models, NAME)]
    heads = [*names, "target", *(["general"] if second else [])]
    rows = []
    for each in sorted(merging.tasted, key=lambda each: -each.target):
        numbers = [*each.weights, each.target, *([each.general] if second else [])]
        best = ' class="best"' if each is merging.chosen else ""
        rows.append(f"<tr{best}>{''.join(cell(number(value), 'number') for value in numbers)}</tr>")
    return table(heads, rows, set(heads))


# --- the trade-off ----------------------------------------------------------------------------------------------------


def _tradeoff_note(merging: Merging) -> str:
    curve = "The line goes from one model alone to the other. " if len(merging.models) == 2 else ""
    asked = "" if merging.least is None else f"The search asked for {number(merging.least)} on the general set or more."
    return f"{merging.metric} of each mixture; further up and to the right is better. {curve}{asked}".strip()


def _tradeoff(merging: Merging) -> str:
    """The drawing, for any console; nothing where there is no second set."""
    points = [each for each in merging.tasted if each.general is not None and math.isfinite(each.general + each.target)]
    return chart(_drawn(merging, points, WIDE), _drawn(merging, points, NARROW)) if points else ""


def _drawn(merging: Merging, points: Sequence[Tasted], width: float) -> str:
    height = 420.0 if width == WIDE else 340.0
    frame = Frame(66, 34, width - 22, height - 50)
    general = [float(each.general or 0) for each in points]
    least = [] if merging.least is None or not math.isfinite(merging.least) else [merging.least]
    x = Scale(*rounded_out(min(general + least), max(general + least), TICKS), frame.left, frame.right)
    target = [each.target for each in points]
    y = Scale(*rounded_out(min(target), max(target), TICKS), frame.bottom, frame.top)
    drawn = [line([(x(at), frame.top), (x(at), frame.bottom)], "middle", f"at least {number(at)}") for at in least]
    if len(merging.models) == 2:
        along = sorted(points, key=lambda each: each.weights)
        drawn.append(line([(x(float(each.general or 0)), y(each.target)) for each in along], "curve r4"))
    names = told_apart(merging.models, NAME if width == WIDE else NAME // 2)
    labels = []
    for each in sorted(points, key=lambda each: each is merging.chosen):  # the chosen one on top
        at = x(float(each.general or 0)), y(each.target)
        drawn.append(mark("dot", *at, "best" if each is merging.chosen else "r6", _told(merging, each)))
        if max(each.weights) == 1:
            anchor = "end" if at[0] > (frame.left + frame.right) / 2 else "start"
            side = -8 if anchor == "end" else 8
            labels.append(words(at[0] + side, at[1] - 8, names[each.weights.index(1)], "halo", anchor))
    room = Frame(frame.left - 6, frame.top - 6, frame.right + 6, frame.bottom + 6)
    axes = bottom_axis(x, frame, f"{merging.metric}, general", int((frame.right - frame.left) / 62))
    axes += left_axis(y, frame, f"{merging.metric}, target", TICKS)
    said = f"{merging.metric} of {len(points)} mixtures, target against general"
    return svg(width, height, said, axes, clipped(room, *drawn), *labels)


def _told(merging: Merging, each: Tasted) -> str:
    """What a point is, for its tooltip."""
    weights = [f"{model}: {weight:g}" for model, weight in zip(merging.models, each.weights, strict=True)]
    found = f"target {number(each.target)}, general {number(each.general)}"
    return "\n".join([*weights, found, *(["chosen"] if each is merging.chosen else [])])
