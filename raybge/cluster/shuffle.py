"""Values that belong together by a hash meet in one Ray task, wherever they come from, and what is found goes back.

No process sees more than one group of inputs or one part of the hashes, and the driver only references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raybge.cluster.remote_calls import unwrap_user_errors

GROUPS = 256  # groups of inputs, and so values that one task gets, at most
PARTS = 64


def exchange(
    groups: Sequence[Any],
    parts: int,
    split: Callable[[Any, int], tuple[Any, list[Any]]],
    meet: Callable[[list[Any]], list[Any]],
    join: Callable[[Any, Any, list[Any]], Any],
) -> list[Any]:
    """One result a group, in order.

    Args:
        split: called as split(group, parts); what the group keeps to itself, and a value for each part.
        meet: from one part's values of all groups, in order, makes a value for each group.
        join: called as join(group, what it kept, its values of all parts); small, since the driver holds it.
    """
    import ray

    def task(function: Callable[..., Any], returns: int) -> Any:
        return ray.remote(function).options(num_returns=returns).remote

    with unwrap_user_errors():
        # several results of a task are several objects: each goes to the one task that wants it
        splits = [task(_split, parts + 1)(split, group, parts) for group in groups]
        met = [task(_meet, len(groups))(meet, *values) for values in zip(*(s[1:] for s in splits), strict=True)]
        if len(groups) == 1:
            met = [[each] for each in met]
        joins = [
            task(_join, 1)(join, group, kept[0], *values)
            for group, kept, values in zip(groups, splits, zip(*met, strict=True), strict=True)
        ]
        return list(ray.get(joins))


def in_groups(items: Sequence[Any], least: int) -> list[Sequence[Any]]:
    """Consecutive items in groups of at least `least`, at most GROUPS of them."""
    size = max(least, -(-len(items) // GROUPS))
    return [items[at : at + size] for at in range(0, len(items), size)]


def _split(split: Callable[..., Any], group: Any, parts: int) -> list[Any]:
    kept, values = split(group, parts)
    return [kept, *values]


def _meet(meet: Callable[..., Any], *values: Any) -> Any:
    found = meet(list(values))
    return found[0] if len(found) == 1 else found


def _join(join: Callable[..., Any], group: Any, kept: Any, *values: Any) -> Any:
    return join(group, kept, list(values))
