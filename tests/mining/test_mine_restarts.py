"""Mining under kill -9 of the program or of an actor, at random moments of every stage."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import stub

PASSAGES, ROWS = 800, 150
SECONDS = 0.3  # to encode or search a block; there are about forty blocks, six of them of rows
# stage in progress, and the actor that is killed; None kills the program itself
KILLS = [
    ("encode", None),
    ("encode", "ray::MapWorker"),
    ("search", "ray::SearchActor"),
    ("search", None),
    ("texts", "ray::SearchActor"),
    ("texts", None),
]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "pool.jsonl", [{"text": f"passage {i} of the pool, {i * i} long"} for i in range(PASSAGES)])
    write(folder / "rows.jsonl", [{"query": f"query {i}", "pos": [f"passage {i} of the pool"]} for i in range(ROWS)])
    words = {"input_file": folder / "rows.jsonl", "corpus_data": folder / "pool.jsonl", "negative_number": 5}
    words |= {"range_for_sampling": "0-20", "num_workers": 2, "shard_size": 150, "shards_per_actor": 1}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def start(log: Path, seconds: float, flags: list[str], output: Path) -> subprocess.Popen:
    storage = ["--output_file", str(output), "--storage_path", str(output.parent)]
    path = os.pathsep.join([str(Path(stub.__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, stub.__file__, str(log), str(seconds), *flags, *storage],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def actors_of(program: subprocess.Popen, name: str) -> list[int]:
    """Return the processes of that name in the program's Ray."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def belongs(pid: int) -> bool:
        while pid > 1 and pid != program.pid:
            pid = parents.get(pid, 0)
        return pid == program.pid

    return [int(pid) for pid, _, args in rows if args.startswith(name) and belongs(int(pid))]


def committed(store: Path) -> dict[Path, int]:
    """Return every file of the store with its modification time."""
    return {path: path.stat().st_mtime_ns for path in store.glob("??/*") if path.suffix != ".tmp"}


def lines(log: Path, stage: str | None = None) -> list[str]:
    """Return the log, or its lines of one stage; lines other than `search` and `texts` are encoded blocks."""
    words = log.read_text().split() if log.exists() else []
    return [word for word in words if stage is None or stage == (word if word in ("search", "texts") else "encode")]


@pytest.mark.alone  # kills processes
def test_output_is_unaffected_by_kills_at_every_stage(flags, tmp_path):
    calm = start(tmp_path / "calm.log", 0, flags, tmp_path / "calm" / "mined.jsonl")
    assert calm.wait(300) == 0, calm.stderr.read()
    blocks = Counter(lines(tmp_path / "calm.log", "encode"))
    assert len(blocks) > 30 and set(blocks.values()) == {1}

    chance = random.Random(7)
    log, output = tmp_path / "log", tmp_path / "out" / "mined.jsonl"
    store = output.parent / "mine"
    program, stored, encoded = None, [], []
    for stage, actor in KILLS:
        program = program or start(log, SECONDS, flags, output)
        wait_for_lines(log, stage, len(lines(log, stage)) + chance.randrange(2, 7), program)
        time.sleep(chance.random() * SECONDS)
        if actor:
            os.kill(chance.choice(actors_of(program, actor)), signal.SIGKILL)
        else:
            program.kill()
            program.wait()
            program = None
            time.sleep(3)  # until its Ray is gone too
        stored.append(committed(store))
        encoded.append(len(lines(log, "encode")))
        assert not output.exists()
    program = start(log, 0, flags, output)
    assert program.wait(300) == 0, program.stderr.read()
    assert output.read_bytes() == (tmp_path / "calm" / "mined.jsonl").read_bytes()
    # complete blocks were never written again; a kill loses at most the block in progress of each actor
    assert all(len(before) > 0 for before in stored)
    at_end = committed(store)
    for before in stored:
        assert before.items() <= at_end.items()
    done = Counter(lines(log, "encode"))
    assert set(done) == set(blocks) and done.total() <= len(blocks) + 2 * 2
    assert encoded[2:] == [encoded[2]] * 4 and encoded[2] == done.total()  # all kills but two came after encoding


def wait_for_lines(log: Path, stage: str, count: int, program: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while len(lines(log, stage)) < count:
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
