"""What all nodes of a cluster must see: a path of one machine is refused before anything starts.

A folder that every node has under the same name need not be the same folder. So of each folder that a command writes
into, every node is asked for a file that the driver has just put there; of a file that it reads, for its size.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raybge.cluster.resources import Cluster
from raybge.util.errors import UserError

# Where Ray unpacks a job's working directory. It goes when the job is over.
UNPACKED = "/runtime_resources/working_dir_files/"
NAMED = 3  # nodes that a message names


def check_shared(cluster: Cluster, written: Mapping[str, str | None], read: Mapping[str, Iterable[str | None]]) -> None:
    """UserError, naming flag, path and nodes, where a node does not see what a command writes or reads.

    Args:
        written: a file or folder to be by its flag. URIs and None pass.
        read: files and folders by their flag. What is no path of this machine (a URI, a name on the hub) passes.
    """
    places = {flag: os.path.abspath(path) for flag, path in written.items() if path and "://" not in path}
    for flag, path in places.items():
        if UNPACKED in path:
            raise UserError(
                f"{flag} {path} lies in the job's copy of the working directory, which is deleted after the job: "
                "give an absolute path on a folder that all nodes share"
            )
    if cluster.nodes < 2:
        return
    with ExitStack() as stack:
        looked = [(flag, path, stack.enter_context(_marked(flag, path))) for flag, path in places.items()]
        for flag, paths in read.items():
            looked += [(flag, path, os.path.abspath(path)) for path in paths if path and os.path.exists(path)]
        here = _sizes([place for *_, place in looked])
        there = _ask_nodes([place for *_, place in looked])
    for i, (flag, path, _) in enumerate(looked):
        if blind := [node for node, sizes in there if sizes[i] != here[i]]:
            fix = "give a path on" if flag in places else "put it on"
            raise UserError(
                f"{flag} {path}: {len(blind)} of {cluster.nodes} nodes do not see it ({_names(blind)}); "
                f"{fix} a folder that all nodes share"
            )


def _names(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - NAMED:,} more" if len(nodes) > NAMED else ""
    return ", ".join(nodes[:NAMED]) + more


@contextmanager
def _marked(flag: str, path: str) -> Iterator[str]:
    """A new file in the folder that `path` is to lie in, while the block runs."""
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
    """The size of each file, -1 for a folder, None where there is nothing."""
    return [-1 if os.path.isdir(path) else os.path.getsize(path) if os.path.exists(path) else None for path in paths]


def _ask_nodes(paths: Sequence[str]) -> list[tuple[str, list[int | None]]]:
    """Each node's address, and `_sizes` there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(_sizes)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([ask.options(num_cpus=0, scheduling_strategy=place).remote(paths) for place in there])
    return list(zip((node["NodeManagerAddress"] for node in nodes), found, strict=True))
