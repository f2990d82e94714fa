"""Checks that all nodes of a cluster see the same files; a path of a single machine is refused before a run starts.

A folder that exists on every node under the same name need not be the same folder. So for each folder that a command
writes into, every node looks for a file that the driver has just created in it; for each input, its size is compared.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raybge.cluster.resources import Cluster
from raybge.util.errors import UserError

# Ray unpacks a job's working directory here, and deletes it after the job.
UNPACKED = "/runtime_resources/working_dir_files/"
LISTED_NODES = 3  # nodes that a message lists


def check_shared(cluster: Cluster, written: Mapping[str, str | None], read: Mapping[str, Iterable[str | None]]) -> None:
    """Check that all nodes see what a command writes and reads.

    Args:
        cluster: the connected cluster.
        written: output file or folder of each flag. URIs and None pass.
        read: inputs of each flag. What is no path of this machine (a URI, a name on the hub) passes.

    Raises:
        UserError: nodes do not see a path; the message names flag, path and nodes.
    """
    outputs = {flag: os.path.abspath(path) for flag, path in written.items() if path and "://" not in path}
    for flag, path in outputs.items():
        if UNPACKED in path:
            raise UserError(
                f"{flag} {path} is in the job's copy of the working directory, which is deleted after the job: "
                "give an absolute path in a folder that all nodes share"
            )
    if cluster.nodes < 2:
        return
    with ExitStack() as stack:
        checks = [(flag, path, stack.enter_context(_marker(flag, path))) for flag, path in outputs.items()]
        for flag, paths in read.items():
            checks += [(flag, path, os.path.abspath(path)) for path in paths if path and os.path.exists(path)]
        sizes = _sizes([path for *_, path in checks])
        node_sizes = _ask_nodes([path for *_, path in checks])
    for i, (flag, path, _) in enumerate(checks):
        if blind := [node for node, seen in node_sizes if seen[i] != sizes[i]]:
            fix = "give a path in" if flag in outputs else "put it into"
            raise UserError(
                f"{flag} {path}: {len(blind)} of {cluster.nodes} nodes do not see it ({_list_nodes(blind)}); "
                f"{fix} a folder that all nodes share"
            )


def _list_nodes(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - LISTED_NODES:,} more" if len(nodes) > LISTED_NODES else ""
    return ", ".join(nodes[:LISTED_NODES]) + more


@contextmanager
def _marker(flag: str, path: str) -> Iterator[str]:
    """Create a file in the nearest existing folder above `path`, for the duration of the block."""
    folder = Path(path)
    while not folder.is_dir():
        folder = folder.parent
    marker = folder / f".raybge-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written ({error.strerror})") from error
    try:
        yield str(marker)
    finally:
        marker.unlink(missing_ok=True)


def _sizes(paths: Sequence[str]) -> list[int | None]:
    """Return the size of each file, -1 for a folder, None for a path that does not exist."""
    return [-1 if os.path.isdir(path) else os.path.getsize(path) if os.path.exists(path) else None for path in paths]


def _ask_nodes(paths: Sequence[str]) -> list[tuple[str, list[int | None]]]:
    """Return each node's address and its `_sizes`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(_sizes)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    sizes = ray.get([task.options(num_cpus=0, scheduling_strategy=strategy).remote(paths) for strategy in strategies])
    return list(zip((node["NodeManagerAddress"] for node in nodes), sizes, strict=True))
