"""Write RESULTS.md from the result files of the benchmarks.

    python benchmarks/results.py runs/bench --out benchmarks/RESULTS.md

A row for each figure with its goal, under the command, date, machine and versions that gave it. The last step of
`make bench`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common

HEAD = """# Results

Written by `benchmarks/results.py` from the files that the benchmarks write (`make bench`). README.md in this folder
says how each is measured. A ratio compares two programs in one run, measured in turn.
"""


def section(name: str, result: dict[str, Any]) -> str:
    """Return the section of one result file in Markdown."""
    versions = ", ".join(f"{library} {version}" for library, version in result.get("versions", {}).items())
    flags = " ".join(result.get("cpu_flags", [])) or "none"
    machine = f"{result['machine']} ({flags})" + (f", {result['gpu']}" if result.get("gpu") else "")
    lines = [f"## {name}", "", f"    {result['command']}", "", f"{result['date']}, {machine}; {versions}.", ""]
    lines += ["| figure | measured | goal | reached |", "| --- | --- | --- | --- |"]
    for each in result["claims"]:
        claim = common.Claim(**each)
        goal = "" if claim.goal is None else f"{'at most' if claim.at_most else 'at least'} {claim.goal:.4g}"
        reached = "" if claim.goal is None else "yes" if claim.is_reached else "no"
        lines.append(f"| {claim.text} | {claim.measured:.4g} | {goal} | {reached} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of the result files")
    parser.add_argument("--out", default=str(Path(__file__).with_name("RESULTS.md")))
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in sorted(Path(args.folder).glob("*.json"))}
    sections = [section(name, result) for name, result in results.items() if result.get("claims")]
    if not sections:
        raise SystemExit(f"{args.folder} has no result file with claims: run a benchmark with --out")
    Path(args.out).write_text("\n".join([HEAD, *sections]))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
