"""Run the commands of a checkout as child processes, and measure their time and memory."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

Flags = Mapping[str, Any]

TIMEOUT_SECONDS = 1200
SAMPLING_SECONDS = 0.25  # between two measurements of a process tree's memory
EXIT_SECONDS = 15  # for Ray's processes to exit after the command

# Starts Ray with a number of CPUs of its own before the command, so that more workers run than the machine has cores.
LAUNCHER = """
import runpy, sys
import ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
module = sys.argv[2]
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

# Prints where raybge is imported from, in a process and in a worker of its Ray.
LOCATE = """
import ray, raybge
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
def location():
    import raybge
    return raybge.__file__

print(raybge.__file__)
print(ray.get(location.remote()))
"""


class CommandError(Exception):
    """A command that did not exit with 0."""


@dataclass(frozen=True)
class Usage:
    """Resources of one command.

    Args:
        seconds: from start to exit.
        peak_bytes: the largest sum of the resident memory of the process tree.
        awaited_seconds: from start until the awaited file existed; None without one.
    """

    seconds: float
    peak_bytes: int
    awaited_seconds: float | None = None


@dataclass(frozen=True)
class Checkout:
    """A checkout of raybge whose commands run as child processes.

    Args:
        path: folder that contains the package.
        root: temporary folder for Ray and logs. Its path must be short, since Ray's sockets are in it.
    """

    path: Path
    root: Path

    def run(
        self, command: str, flags: Flags, ray_cpus: int | None = None, awaited: Path | None = None
    ) -> tuple[Usage, str]:
        """Run `python -m raybge.COMMAND` to its end.

        Args:
            command: for example "train".
            flags: by name. None and empty values are left out, a list becomes several words.
            ray_cpus: CPUs that Ray offers whatever the machine has; None: the command starts Ray itself.
            awaited: file whose creation is timed.

        Returns:
            Resources and console output.

        Raises:
            CommandError: the exit code is not 0, or the time is over.
        """
        start = (
            ["-m", f"raybge.{command}"] if ray_cpus is None else ["-c", LAUNCHER, str(ray_cpus), f"raybge.{command}"]
        )
        return self.python([*start, *words_of(flags)], awaited)

    def check(self) -> None:
        """Check that children and their Ray workers import raybge from this checkout.

        Raises:
            SystemExit: another installation has precedence.
        """
        expected = str(self.path / "raybge" / "__init__.py")
        _, output = self.python(["-c", LOCATE])
        locations = [line for line in output.splitlines() if line.endswith("__init__.py")]
        if locations != [expected] * 2:
            raise SystemExit(f"raybge must be imported from {expected}, but it is imported from {output}")

    def python(self, arguments: Sequence[str], awaited: Path | None = None) -> tuple[Usage, str]:
        """Run Python in an empty folder with this checkout first on its path; see `run`."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("work", "tmp"):
            (self.root / name).mkdir(parents=True)
        log = self.root / "output.txt"
        command = [sys.executable, *arguments]
        with open(log, "wb") as output:
            start = time.monotonic()
            process = subprocess.Popen(
                command,
                cwd=self.root / "work",
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            usage = measured(process, start, awaited, self.root)
        text = log.read_text(errors="replace")
        if process.returncode:
            logs = "".join(
                file.read_text(errors="replace")[-3000:] for file in (self.root / "tmp").glob("raybge-*.log")
            )
            raise CommandError(f"exit code {process.returncode} of {shlex.join(command)}\n{text[-3000:]}\n{logs}")
        shutil.rmtree(self.root, ignore_errors=True)
        return usage, text

    def _environment(self) -> dict[str, str]:
        """Return the environment of a child: no cluster to join, no model hub, ports on loopback."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        return inherited | {
            "PYTHONPATH": str(self.path),
            "TMPDIR": str(self.root / "tmp"),
            "RAY_TMPDIR": str(self.root),
            "RAY_ADDRESS": "local",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def measured(process: subprocess.Popen[bytes], start: float, awaited: Path | None, root: Path) -> Usage:
    """Wait for a command, sample the memory of its process tree, and end whatever it leaves behind."""
    tree: dict[int, psutil.Process] = {}
    peak = 0
    awaited_seconds = None
    last_sample = 0.0
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now - start > TIMEOUT_SECONDS:
                raise CommandError(f"no end after {TIMEOUT_SECONDS} s: {shlex.join(map(str, process.args))}")
            if awaited is not None and awaited_seconds is None and awaited.exists():
                awaited_seconds = now - start
            if now - last_sample >= SAMPLING_SECONDS:
                last_sample = now
                peak = max(peak, sampled(process.pid, tree))
            time.sleep(0.02)
        return Usage(time.monotonic() - start, peak, awaited_seconds)
    finally:
        end_processes([*tree.values(), *processes_of(root)])
        process.wait()


def sampled(pid: int, tree: dict[int, psutil.Process]) -> int:
    """Add a process and its descendants to `tree` and return the sum of their resident memory in bytes."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for each in (parent, *parent.children(recursive=True)):
            tree[each.pid] = each
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
    return total


def processes_of(root: Path) -> Iterator[psutil.Process]:
    """Yield the processes whose command line names the temporary folder of a run, such as Ray's servers."""
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(root) in word for word in each.cmdline()) and each.pid != os.getpid():
                yield each


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes that are exiting, then kill the remaining ones."""
    _, alive = psutil.wait_procs(processes, timeout=EXIT_SECONDS)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(alive, timeout=EXIT_SECONDS)


def words_of(flags: Flags) -> list[str]:
    """Return flags as the words of a command line."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words
