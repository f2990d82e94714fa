"""Hash-partitioned shuffle across Ray tasks, with a result for each group of inputs.

No process sees more than one group of inputs or one part of the hashes, and the driver only references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raybge.cluster.remote_calls import unwrap_user_errors

GROUPS = 256  # most groups of inputs, and so most values that one task receives
PARTS = 64


def exchange(
    groups: Sequence[Any],
    parts: int,
    split: Callable[[Any, int], tuple[Any, list[Any]]],
    process: Callable[[list[Any]], list[Any]],
    join: Callable[[Any, Any, list[Any]], Any],
) -> list[Any]:
    """Split groups into parts, process each part of all groups in one task, and join each group's results.

    Args:
        groups: inputs, one task each.
        parts: number of parts, one task each.
        split: called as split(group, parts); returns a value that stays with the group, and one value per part.
        process: called with one part's values of all groups, in order; returns one value per group.
        join: called as join(group, the value that stayed, its values of all parts); its result should be small, since
            the driver holds it.

    Returns:
        One result per group, in order.
    """
    import ray

    def task(function: Callable[..., Any], returns: int) -> Any:
        return ray.remote(function).options(num_returns=returns).remote

    with unwrap_user_errors():
        # Several results of a task are several objects: each is transferred only to the task that needs it.
        splits = [task(_split, parts + 1)(split, group, parts) for group in groups]
        exchanged = [
            task(_process, len(groups))(process, *values) for values in zip(*(s[1:] for s in splits), strict=True)
        ]
        if len(groups) == 1:
            exchanged = [[each] for each in exchanged]
        joins = [
            task(_join, 1)(join, group, stays[0], *values)
            for group, stays, values in zip(groups, splits, zip(*exchanged, strict=True), strict=True)
        ]
        return list(ray.get(joins))


def in_groups(items: Sequence[Any], least: int) -> list[Sequence[Any]]:
    """Split items into at most GROUPS groups of consecutive items, of at least `least` each."""
    size = max(least, -(-len(items) // GROUPS))
    return [items[at : at + size] for at in range(0, len(items), size)]


def _split(split: Callable[..., Any], group: Any, parts: int) -> list[Any]:
    stays, values = split(group, parts)
    return [stays, *values]


def _process(process: Callable[..., Any], *values: Any) -> Any:
    results = process(list(values))
    return results[0] if len(results) == 1 else results


def _join(join: Callable[..., Any], group: Any, stays: Any, *values: Any) -> Any:
    return join(group, stays, list(values))
