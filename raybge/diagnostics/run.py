"""Run of `raybge.selftest`: the checks, one line each, and their verdicts as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from raybge.cli.console import Console
from raybge.diagnostics.machine_checks import CHECKS, CheckFailedError, NeedsGpuError
from raybge.model.inference import pick_device
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import first_line
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.cli.options import SelftestOptions

PASSED, FAILED, NEEDS_GPU = "pass", "FAIL", "needs a GPU"


class SelftestFailedError(Exception):
    """A check has failed."""


@dataclass(frozen=True)
class Verdict:
    """Result of one check.

    Args:
        check: its name.
        verdict: PASSED, FAILED or NEEDS_GPU.
        details: what it measured, or why it failed.
        seconds: how long it took.
    """

    check: str
    verdict: str
    details: str
    seconds: float


def selftest(options: SelftestOptions, console: Console) -> dict[str, Any]:
    """Run all checks.

    Args:
        options: the flags.
        console: receives a line for each check.

    Returns:
        Machine, versions and verdicts, as in `--output_file`.

    Raises:
        SelftestFailedError: a check has failed; the others have run.
        UserError: no such device.
    """
    device = pick_device(options.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    console.info(f"device: {device} ({machine}), torch {torch.__version__}")
    verdicts = run_checks(CHECKS, device, console)
    counts = {kind: sum(each.verdict == kind for each in verdicts) for kind in (PASSED, FAILED, NEEDS_GPU)}
    summary = {
        "device": str(device),
        "machine": machine,
        "torch": torch.__version__,
        "checks": [asdict(each) for each in verdicts],
    }
    if options.output_file:
        with open_atomic(options.output_file, "--output_file") as file:
            file.write(json.dumps(summary, indent=2).encode() + b"\n")
        console.info(f"written: {options.output_file}")
    waiting = f", {counts[NEEDS_GPU]} more on a machine with a GPU" if counts[NEEDS_GPU] else ""
    console.info(f"{plural(counts[PASSED], 'check')} passed, {counts[FAILED]} failed{waiting}")
    if counts[FAILED]:
        names = ", ".join(each.check for each in verdicts if each.verdict == FAILED)
        raise SelftestFailedError(f"{plural(counts[FAILED], 'check')} failed: {names}")
    return summary


def run_checks(
    checks: Sequence[Callable[[torch.device], str]], device: torch.device, console: Console
) -> list[Verdict]:
    """Run checks one after the other; none ends the others."""
    verdicts = []
    for check in checks:
        name, start = check.__name__.replace("_", " "), time.monotonic()
        try:
            verdict, details = PASSED, check(device)
        except NeedsGpuError as error:
            verdict, details = NEEDS_GPU, str(error)
        except CheckFailedError as error:
            verdict, details = FAILED, str(error)
        except Exception as error:  # whatever a device or its libraries raise is a finding
            console.log_traceback()
            verdict, details = FAILED, f"{type(error).__name__}: {first_line(error)}"
        verdicts.append(Verdict(name, verdict, details, round(time.monotonic() - start, 1)))
        console.info(f"{verdict:<12} {name:<28} {details}  ({verdicts[-1].seconds:.0f} s)")
    return verdicts
