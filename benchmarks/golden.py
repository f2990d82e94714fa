"""Compare two checkouts of raybge: equal results, and no loss of speed or memory.

    python benchmarks/golden.py compare OLD_CHECKOUT NEW_CHECKOUT
    python benchmarks/golden.py compare OLD_CHECKOUT NEW_CHECKOUT --only train-1-worker mine
    python benchmarks/golden.py speed OLD_CHECKOUT NEW_CHECKOUT --rounds 5 --out runs/bench/golden-speed.json
    python benchmarks/golden.py record CHECKOUT

compare: run the same commands from both checkouts on the same generated inputs and compare the output files. Print one
line per case and exit with 1 if any output differs. Runs with one worker, mining, evaluation, encoding and merging must
be equal bit for bit. Runs with several workers may differ by 1e-6 of the distance between the final and the initial
weights, because the order of a sum across processes is not guaranteed. A self-check repeats one case of each command
from the old checkout with one altered flag, such as another seed, and fails unless the comparison reports a difference.

speed: run training, mining, encoding and `--help` from both checkouts in turn and print the ratio new/old of time and
peak memory (minimum, median and maximum over the rounds). Exit with 1 if a median is worse by more than --limit.

record: write tests/golden.json, the reference values of tests/test_golden.py, with the commands of a checkout.

A checkout is a folder that contains the package `raybge`. Every command is a child process with PYTHONPATH set to the
checkout, an empty current folder, its own temporary folder and its own Ray. Only public commands, flags and output
files are used, so the checkouts may differ in their internal modules.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import STEPS, Case, cases, encode_flags, evaluate_flags, mine_flags, train_flags
from golden_commands import Checkout, CommandError, Flags, words_of
from golden_inputs import Inputs, read_rows, write_bert, write_data, write_inputs
from golden_outputs import Comparison, read_log, read_metrics, read_weights

Call = Callable[[str, Flags], Any]  # runs a command by name, such as "train", with its flags

REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "golden.json"
SPEED_LIMIT = 0.03


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclass
class Comparing:
    """Runs cases in both checkouts and prints one line for each comparison."""

    old: Checkout
    new: Checkout
    folder: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def run(self, case: Case) -> None:
        """Compare the checkouts by one case, then check that an altered run of the old checkout differs."""
        old, new, altered = (self.folder / case.name / name for name in ("old", "new", "altered"))
        try:
            self._create((old, new, altered), case)
            resume = {"resume": True} if case.interrupted else {}
            case.run(self.old, old, **resume)
            case.run(self.new, new, **resume)
            comparisons = case.compare(old, new)
            self._print(case.name, case, comparisons, all(each.equal for each in comparisons), "ok", "DIFFERENT")
            if case.altered:
                case.run(self.old, altered, **case.altered)
                name = f"self-check: {case.name} {' '.join(words_of(case.altered))}"
                comparisons = case.compare(old, altered)
                pairs = zip(case.outputs, comparisons, strict=True)
                differs = not any(each.equal for output, each in pairs if output.always_altered)
                self._print(name, case, comparisons, differs, "differs: ok", "NOT DETECTED")
        except CommandError as error:
            print(error, file=sys.stderr)
            self._print(case.name, case, [], False, "ok", "FAILED")
        shutil.rmtree(self.folder / case.name, ignore_errors=True)

    def _create(self, folders: Sequence[Path], case: Case) -> None:
        """Create the output folders. A case that resumes has in each the same interrupted run of the old checkout."""
        if case.interrupted is None:
            for folder in folders:
                folder.mkdir(parents=True)
            return
        first = self.folder / case.name / "first"
        case.run(self.old, first)
        shutil.rmtree(first / f"checkpoint-{STEPS}")  # as if the run had ended before
        for name in ("train_results.json", "trainer_state.json", "model.safetensors"):
            (first / name).unlink()
        for folder in folders:
            shutil.copytree(first, folder)

    def _print(
        self, name: str, case: Case, comparisons: Sequence[Comparison], success: bool, good: str, bad: str
    ) -> None:
        """Print and record one line."""
        required = f"at most {case.limit:.0e}" if case.limit else "bit for bit"
        verdict = good if success else bad
        print(f"{name:<32}  {', '.join(map(str, comparisons))}  ({required})  {verdict}", flush=True)
        differences = {each.subject: each.figure for each in comparisons}
        self.lines.append({"case": name, "differences": differences, "limit": case.limit, "ok": success})


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the results of two checkouts."""
    inputs = write_inputs(folder / "inputs")
    everything = cases(inputs)
    names = [case.name for case in everything]
    if unknown := set(args.only or ()) - set(names):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such case; cases: {' '.join(names)}")
    old, new = checkouts(args, folder)
    comparing = Comparing(old, new, folder)
    for case in everything:
        if not args.only or case.name in args.only:
            comparing.run(case)
    successes = sum(line["ok"] for line in comparing.lines)
    print(f"{successes} of {len(comparing.lines)} lines ok", flush=True)
    return {"lines": comparing.lines, "holds": successes == len(comparing.lines)}


def checkouts(args: argparse.Namespace, folder: Path) -> list[Checkout]:
    """Return the checkouts of the command line, checked."""
    paths = [Path(path).resolve() for path in args.checkouts]
    pair = [Checkout(path, folder / name) for path, name in zip(paths, ("a", "b"), strict=False)]
    for checkout in pair:
        checkout.check()
    return pair


# --- speed ------------------------------------------------------------------------------------------------------------

HELP_RUNS = 5  # of `--help` in one measurement, which is their median
# name of a figure: true if more of it is better
FIGURES = {
    "train: seconds to the first step": False,
    "train: samples per second": True,
    "train: seconds": False,
    "train: peak memory": False,
    "mine: seconds": False,
    "mine: peak memory": False,
    "encode: seconds": False,
    "encode: peak memory": False,
    "--help: seconds": False,
}


def write_speed_inputs(folder: Path, passages: int) -> Inputs:
    """Write a model and data large enough for some ten seconds of work for each command."""
    folder.mkdir(parents=True)
    write_data(folder, passages // 3, passages, 120)
    write_bert(folder / "model", hidden=128, layers=4, std=0.05, dropout=0.1)
    return Inputs(folder)


def usage_of(checkout: Checkout, inputs: Inputs, folder: Path, steps: int) -> dict[str, float]:
    """Measure every figure of FIGURES once."""
    cores = min(2, os.cpu_count() or 1)
    scale = {"num_workers": 1, "cpus_per_worker": cores, "use_gpu": False}
    folder.mkdir(parents=True)
    output = folder / "train"
    sizes = {"global_batch_size": 32, "train_group_size": 2, "query_max_len": 32, "passage_max_len": 128}
    flags = train_flags(inputs, output_dir=str(output), max_steps=steps, **scale, **sizes)
    usage, _ = checkout.run("train", flags, awaited=output / "rows" / "1-0.jsonl")
    results = json.loads((output / "train_results.json").read_text())
    figures = {
        "train: seconds to the first step": usage.awaited_seconds or float("nan"),
        "train: samples per second": results["train_samples_per_second"],
        "train: seconds": usage.seconds,
        "train: peak memory": usage.peak_bytes,
    }
    searching = mine_flags(inputs, output_file=str(folder / "mined.jsonl"), range_for_sampling="2-100", **scale)
    encoding = encode_flags(inputs, "", **scale) | {"output_file": str(folder / "vectors.npy")}
    for command, flags in (("mine", searching), ("encode", encoding)):
        usage, _ = checkout.run(command, flags)
        figures[f"{command}: seconds"] = usage.seconds
        figures[f"{command}: peak memory"] = usage.peak_bytes
    help_runs = [checkout.python(["-m", "raybge.train", "--help"])[0].seconds for _ in range(HELP_RUNS)]
    figures["--help: seconds"] = statistics.median(help_runs)
    shutil.rmtree(folder)
    return figures


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both checkouts, each first in every second round, and print the ratios."""
    inputs = write_speed_inputs(folder / "inputs", args.passages)
    pair = checkouts(args, folder)
    for checkout in pair:
        checkout.python(["-m", "compileall", "-q", str(checkout.path / "raybge")])
    rounds: list[list[dict[str, float]]] = []
    for number in range(args.rounds):
        turn = 1 if number % 2 == 0 else -1
        figures_in_turn = [usage_of(checkout, inputs, folder / "run", args.steps) for checkout in pair[::turn]]
        rounds.append(figures_in_turn[::turn])
        for name in FIGURES:
            old, new = (figures[name] for figures in rounds[-1])
            print(f"round {number + 1}  {name:<34} old {plain(name, old)}  new {plain(name, new)}", flush=True)
    print(f"{'ratio new/old':<36} {'min':>7} {'median':>7} {'max':>7}")
    ratios, slower = {}, []
    for name, more_is_better in FIGURES.items():
        values = sorted(new[name] / old[name] for old, new in rounds)
        median = statistics.median(values)
        worse = median < 1 / (1 + args.limit) if more_is_better else median > 1 + args.limit
        if worse:
            slower.append(name)
        print(f"{name:<36} {values[0]:7.3f} {median:7.3f} {values[-1]:7.3f}  {'WORSE' if worse else 'ok'}")
        ratios[name] = {"min": values[0], "median": median, "max": values[-1]}
    return {"rounds": rounds, "ratios": ratios, "worse": slower, "holds": not slower}


def plain(name: str, value: float) -> str:
    """Return a figure with a suitable number of digits."""
    return f"{value / 1e6:9,.0f} MB" if "memory" in name else f"{value:9.2f}   "


# --- reference values -------------------------------------------------------------------------------------------------

# Weights of which a change is recorded. The bias of a key is none of them: its true gradient is zero.
RECORDED = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.1.attention.self.key.weight",
    "encoder.layer.1.output.dense.bias",
)


def reference_values(folder: Path, call: Call) -> dict[str, Any]:
    """Train, mine and evaluate on a small scale and return numbers by which a change of behavior is detected.

    SGD is used: its steps are proportional to the gradient, so that another scale of the loss changes the weights, and
    noise of weights whose true gradient is zero stays small.

    Args:
        folder: where to work; it must not exist.
        call: runs a command with flags.

    Returns:
        By run: losses and gradient norms of each step and the norms of the changes of some weights; the numbers of the
        mined passages of each row; the metrics by name.
    """
    inputs = write_inputs(folder / "inputs")
    plain_sgd = {"optim": "sgd", "learning_rate": 0.05}
    mixed = {
        "knowledge_distillation": True,
        "kd_loss_type": "m3_kd_loss",
        "use_mrl": True,
        "mrl_dims": [16, 32],
        "bidirectional": True,
        "false_negative_margin": 0.05,
        "sub_batch_size": 4,
    }
    values: dict[str, Any] = {}
    for name, more in (("train", {}), ("train-options", mixed)):
        call("train", train_flags(inputs, output_dir=str(folder / name), **plain_sgd, **more))
        log = read_log(folder / name)
        initial, final = read_weights(Path(inputs.path("model"))), read_weights(folder / name)
        values[name] = {series: log[series][:, 1].tolist() for series in ("loss", "grad_norm")}
        values[name]["change"] = {each: float(np.linalg.norm(final[each] - initial[each])) for each in RECORDED}
    call("mine", mine_flags(inputs, output_file=str(folder / "mined.jsonl")))
    numbers = {row["text"]: number for number, row in enumerate(read_rows(Path(inputs.path("corpus.jsonl"))))}
    values["mined"] = [[numbers[text] for text in row["neg"]] for row in read_rows(folder / "mined.jsonl")]
    metrics_file = str(folder / "metrics.json")
    call("evaluate", evaluate_flags(inputs, metrics_file=metrics_file, run_file=None))
    values["metrics"] = {name: float(value) for name, value in read_metrics(Path(metrics_file)).items()}
    return values


def record(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the reference values of the tests, with the commands of one checkout."""
    (checkout,) = checkouts(args, folder)
    values = reference_values(folder / "record", lambda command, flags: checkout.run(command, flags))
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.7g}"))
    lines = [f'"{name}": {json.dumps(value)}' for name, value in rounded.items()]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written: {REFERENCE}")
    return {"holds": True}


# --- command line -----------------------------------------------------------------------------------------------------


def write_result(result: Mapping[str, Any], path: str) -> None:
    """Write a result as JSON with the command and the environment."""
    import torch
    import transformers

    environment = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**environment, **result}, indent=2) + "\n")
    print(f"written: {path}")


def main() -> None:
    """Parse the command line and run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(dest="part", required=True)
    for name, function in (("compare", compare), ("speed", speed), ("record", record)):
        sub = subcommands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        sub.set_defaults(function=function)
        count, what = (1, "folder") if name == "record" else (2, "the old and the new folder")
        sub.add_argument("checkouts", nargs=count, metavar="CHECKOUT", help=f"{what} that contains the package raybge")
        sub.add_argument("--out", help="write the result there as JSON")
        if name == "compare":
            sub.add_argument("--only", nargs="+", metavar="NAME", help="cases to run; default: all")
        if name == "speed":
            sub.add_argument("--rounds", type=int, default=5, help="measurements of each checkout")
            sub.add_argument("--steps", type=int, default=60, help="training steps")
            sub.add_argument("--passages", type=int, default=6000, help="passages to mine from and to encode")
            sub.add_argument("--limit", type=float, default=SPEED_LIMIT, help="largest accepted loss of a median")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit through `finally`, which ends child processes
    with tempfile.TemporaryDirectory(prefix="golden-", ignore_cleanup_errors=True) as folder:
        result = args.function(args, Path(folder).resolve())
    if args.out:
        write_result(result, args.out)
    if not result["holds"]:
        raise SystemExit("the checkouts differ" if args.part == "compare" else "the limit is exceeded")


if __name__ == "__main__":
    main()
