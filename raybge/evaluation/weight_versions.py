"""Evaluation of several versions of a run's weights: the last ones, and averages of them.

Console, results file, model card and report page show the same list of `WeightVersion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raybge.evaluation.metric_changes import MetricChange, changes_from_json, to_json
from raybge.evaluation.significance import LEVEL

LAST = "last"  # name of the version of the last weights
WEIGHT_VERSIONS = "weight_versions"  # key in the results of a training run
HEAD = ("weights", "metric", "value", "difference from the last", f"{LEVEL:.0%} interval", "verdict")


@dataclass(frozen=True)
class WeightVersion:
    """A version of the weights.

    Args:
        name: Description of the weights, such as "last" or "EMA 0.999".
        saved: True for the weights of the saved model.
        changes: Each metric with the last weights ("before") and with this version ("after"); for the last weights
            themselves both are equal.
    """

    name: str
    saved: bool
    changes: Sequence[MetricChange]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Table rows of HEAD, one for each metric."""
        name = f"{self.name} (saved)" if self.saved else self.name
        texts = [change.texts for change in self.changes]
        if self.name == LAST:
            return [(name, metric, after, "–", "–", "") for metric, _, after, *_ in texts]
        return [(name, metric, after, *rest) for metric, _, after, *rest in texts]


def versions_table(versions: Iterable[WeightVersion]) -> list[list[str]]:
    """Return HEAD and the rows of all versions; empty without versions."""
    rows = [list(row) for version in versions for row in version.rows]
    return [list(HEAD), *rows] if rows else []


def versions_to_json(versions: Iterable[WeightVersion]) -> list[dict[str, Any]]:
    """Return the versions as the results of a run contain them."""
    return [{"weights": each.name, "saved": each.saved, "metrics": to_json(each.changes)} for each in versions]


def versions_in(results: Mapping[str, Any]) -> list[WeightVersion]:
    """Return the versions that the results of a training run contain."""
    return [
        WeightVersion(each["weights"], each["saved"], changes_from_json(each["metrics"]))
        for each in results.get(WEIGHT_VERSIONS, [])
    ]
