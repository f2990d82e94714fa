"""Repeat small runs in one Ray: resources in use between rounds must not grow.

    python tests/soak/runs.py --minutes 30

A round trains, mines, evaluates and encodes with a model of two layers. After each round actors, placement groups, the
object store, processes, open files of this process and of Ray's, and files that are neither output nor log are counted.
Exit code 1 if a count grows by at least one in two rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from tiny import make_tiny

WARM = 2  # rounds that fill caches and pools
SETTLED, PATIENCE = 3.0, 45.0  # seconds between two equal counts, and seconds after which a count is taken as it is
BYTES = 4096  # bytes of the object store that count as one unit
WORDS = [first + second for first in "abcdefghij" for second in "klmnopqrst"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    # a short path, since the names of Ray's sockets may have 107 characters; contains all temporary files
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    os.environ |= {"TMPDIR": str(folder / "t"), "RAY_TMPDIR": str(folder / "t"), "HF_HUB_OFFLINE": "1"}
    (folder / "t").mkdir()
    tempfile.tempdir = None
    try:
        return soak(folder, minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(folder: Path, minutes: float) -> int:
    import ray

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    inputs(folder)
    seen: list[dict[str, int]] = []
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end or len(seen) < WARM + 2:
        start = time.monotonic()
        one_round(folder)
        seen.append(at_rest(folder))
        figures = ", ".join(f"{name} {value:,}" for name, value in seen[-1].items())
        print(f"round {len(seen)} ({time.monotonic() - start:.0f} s): {figures}", flush=True)
    ray.shutdown()
    grew = growth(seen)
    for name, by in grew.items():
        print(f"{name}: grew by {by:,} in {len(seen) - WARM:,} rounds")
    print(f"{len(seen):,} rounds, {'some counts grow' if grew else 'no count grows'}")
    return int(bool(grew))


def growth(seen: list[dict[str, int]]) -> dict[str, int]:
    """Return the counts that grew by at least one in two rounds since the warm-up."""
    rounds = len(seen) - WARM
    counts = {name: seen[-1][name] - seen[WARM - 1][name] for name in seen[-1]}
    return {name: by for name, by in counts.items() if by / (BYTES if "bytes" in name else 1) >= rounds / 2}


def inputs(folder: Path) -> None:
    size = {"vocab_size": 4 + len(WORDS), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    make_tiny(folder / "model", pooler=False, words=WORDS, **size)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 6)) for _ in range(60)]
    groups = [
        {"query": " ".join(text.split()[:4]), "pos": [text], "neg": [texts[i - 1]]} for i, text in enumerate(texts)
    ]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def one_round(folder: Path) -> None:
    """Run each command once, after deleting the outputs of the round before."""
    import raybge

    out, model = folder / "out", str(folder / "model")
    shutil.rmtree(out, ignore_errors=True)
    groups, corpus = str(folder / "groups.jsonl"), str(folder / "corpus.jsonl")
    scale = dict(num_workers="1", cpus_per_worker=1)
    raybge.mine_hard_negatives(
        **dict(model_name_or_path=model, input_file=groups, output_file=str(out / "mined.jsonl"), negative_number=2),
        **dict(range_for_sampling="1-20", **scale),
    )
    raybge.finetune(
        **dict(model_name_or_path=model, train_data=str(out / "mined.jsonl"), output_dir=str(out / "run")),
        **dict(per_device_train_batch_size=20, num_train_epochs=1, save_steps=2, save_total_limit=1, eval_data=groups),
        **scale,
    )
    raybge.evaluate_retrieval(
        encoder=str(out / "run"), corpus_data=corpus, query_data=groups, metrics_file=str(out / "metrics.json"), **scale
    )
    raybge.encode_dataset(
        model_name_or_path=str(out / "run"), input_file=corpus, output_file=str(out / "corpus.npy"), **scale
    )


def at_rest(folder: Path) -> dict[str, int]:
    """Return the counts once they do not change any more."""
    until = time.monotonic() + PATIENCE
    counts = look(folder)
    while time.monotonic() < until:
        time.sleep(SETTLED)
        before, counts = counts, look(folder)
        if before == counts:
            break
    return counts


def look(folder: Path) -> dict[str, int]:
    import ray

    gc.collect()
    groups = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
    actors = [each for each in ray._private.state.actors().values() if each["State"] != "DEAD"]
    family = psutil.Process().children(recursive=True)
    servers = {each.name(): each for each in family if each.name() in ("raylet", "gcs_server")}
    return {
        "actors": len(actors),
        "placement groups": len(groups),
        "object store bytes": sum(store_bytes(node) for node in ray.nodes()),
        "processes": len(family),
        "open files": psutil.Process().num_fds(),
        **{f"open files of {name}": open_files(each) for name, each in sorted(servers.items())},
        "temporary files": sum(1 for _ in leftover_files(folder)),
        "files of shared memory": len(list(Path("/dev/shm").iterdir())) if Path("/dev/shm").is_dir() else 0,
    }


def open_files(server: psutil.Process) -> int:
    """Count files and connections.

    With actors of Ray Data or Ray Train, also without raybge, gcs_server keeps an unconnected socket, which is not
    counted.
    """
    return len(server.open_files()) + len(server.net_connections("all"))


def store_bytes(node: dict) -> int:
    """Return the bytes of the objects in a node's store."""
    from ray._private.internal_api import node_stats

    counts = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return counts.store_stats.object_store_bytes_used


def leftover_files(folder: Path):
    """Yield files that are neither output nor log: temporary files, and hidden files of the output folder."""
    for top in (folder / "t", folder / "out"):
        for path in top.rglob("*"):
            inside = path.relative_to(top).parts
            hidden = any(part.startswith(".") or ".part" in part or part.endswith(".work") for part in inside)
            log = "logs" in inside or path.suffix == ".log" or "torchinductor" in inside[0]
            if path.is_file() and not log and (hidden or top.name == "t"):
                yield path


if __name__ == "__main__":
    raise SystemExit(main())
