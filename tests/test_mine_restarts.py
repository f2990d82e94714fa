"""Mining that is killed: kill -9 of the program or of an actor, at a random moment, five times in a row."""

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

from raybge.search.store import Store

PASSAGES, ROWS = 1200, 150
SECONDS = 0.3  # that encoding a block takes; there are some fifty


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "pool.jsonl", [{"text": f"passage {i} of the pool, {i * i} long"} for i in range(PASSAGES)])
    write(folder / "rows.jsonl", [{"query": f"query {i}", "pos": [f"passage {i} of the pool"]} for i in range(ROWS)])
    words = {"input_file": folder / "rows.jsonl", "candidate_pool": folder / "pool.jsonl", "negative_number": 5}
    words |= {"range_for_sampling": "0-20", "num_workers": 2, "shard_size": 250, "shards_per_actor": 2}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def start(log: Path, seconds: float, flags: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, stub.__file__, str(log), str(seconds), *flags, "--output_file", str(output)]
    path = os.pathsep.join([str(Path(stub.__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def actors_of(program: subprocess.Popen) -> list[int]:
    """Processes of the program's Ray that encode or search."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def belongs(pid: int) -> bool:
        while pid > 1 and pid != program.pid:
            pid = parents.get(pid, 0)
        return pid == program.pid

    return [
        int(pid) for pid, _, args in rows if args.startswith(("ray::MapWorker", "ray::HostActor")) and belongs(int(pid))
    ]


def committed(work: Path) -> set[str]:
    """Digests of the texts of the blocks whose vectors are kept."""
    store = Store(str(work))
    found = set()
    for path in work.glob("??/*"):
        if len(path.name) == 32 and path.read_bytes()[:6] == b"ARROW1":
            table = store.table(path.name)
            texts = table["text"].to_pylist()
            is_query = texts[0].startswith("{")
            found.add(stub.digest_of([json.loads(text)["query"] for text in texts] if is_query else texts))
    return found


def lines(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_killed_five_times_it_ends_as_if_undisturbed(flags, tmp_path):
    calm = start(tmp_path / "calm.log", 0, flags, tmp_path / "calm.jsonl")
    assert calm.wait(300) == 0, calm.stderr.read()
    blocks = Counter(lines(tmp_path / "calm.log"))
    assert len(blocks) > 40 and set(blocks.values()) == {1}

    chance = random.Random(7)
    log, output = tmp_path / "log", tmp_path / "out" / "mined.jsonl"
    work = Path(f"{output}.work")
    program, done = None, []
    for kill in ("program", "actor", "program", "actor", "program"):
        if program is None:
            program = start(log, SECONDS, flags, output)
        wait_for_lines(log, len(lines(log)) + chance.randrange(2, 7), program)
        time.sleep(chance.random() * SECONDS)
        if kill == "program":
            program.kill()
            program.wait()
            program = None
            time.sleep(3)  # its Ray, too, is gone then
        else:
            os.kill(chance.choice(actors_of(program)), signal.SIGKILL)
        done.append((committed(work), len(lines(log))))
    assert not output.exists() and done[-1][0]
    program = start(log, 0, flags, output)
    assert program.wait(300) == 0, program.stderr.read()
    assert output.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    for kept, at in done:
        assert not kept & set(lines(log)[at:])
    assert set(lines(log)) == set(blocks) and len(lines(log)) <= len(blocks) + 2 * len(done)
    assert not work.exists()


def wait_for_lines(log: Path, count: int, program: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while len(lines(log)) < count:
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
