"""Peak memory of a training step for two batch sizes, and of a million scores per query, computed in blocks.

    python benchmarks/memory.py --out runs/bench/memory.json

Step: with `--sub_batch_size 16` the peak of a whole process that takes one step (forward, backward, AdamW) on 1,024
groups is at most 1.3 times that of one on 64 groups; for comparison, one on 64 groups without sub-batches. MiniLM on
medquad, queries 64 and passages 128 tokens, groups of 2.

Scores: InfoNCE of 64 queries over 1,000,000 passages of 256 dimensions with its backward pass adds at most 100 MB to
the inputs and their gradients with `--score_block`; for comparison, without.

Every measurement is a process of its own, on the CPU. Peaks are the kernel's (VmHWM), which requires Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

STEP_LIMIT = 1.3
SCORE_LIMIT_MB = 100
GROUPS = (64, 1024)
TEMPERATURE = 0.02


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Reset VmHWM to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


# --- in a process of its own ------------------------------------------------------------------------------------------


def step_peak(args: argparse.Namespace) -> dict[str, float]:
    """Return the peak memory of this process after one step on `args.groups` groups."""
    import numpy as np
    import torch

    from raybge.data.step_batch import Groups, StepBatch
    from raybge.losses.contrastive_model import ContrastiveModel
    from raybge.losses.objective import Objective
    from raybge.model.encoder import Encoder
    from raybge.model.packing import prepare_for_training

    torch.set_num_threads(args.threads)
    encoder = Encoder(common.minilm(), devices="cpu")
    data = args.data or common.medquad("train.jsonl.gz")
    rows = common.rows(data, 2 * args.groups) if data else common.random_rows(2 * args.groups, 0)
    positives = [row["pos"][0] for row in rows]
    queries = tokenize(encoder, [row["query"] for row in rows[: args.groups]], 64)
    # a group's negative is the positive of a row that is in no group
    pairs = [text for pair in zip(positives[: args.groups], positives[args.groups :], strict=True) for text in pair]
    token_ids = queries + tokenize(encoder, pairs, 128)
    batch = StepBatch(0, [(0, i) for i in range(args.groups)], token_ids, Groups(np.full(args.groups, 2, np.int64)))
    prepare_for_training(encoder.model)
    model = ContrastiveModel(encoder.model, Objective(TEMPERATURE), None, sub_batch_size=args.sub_batch_size)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    before = resident("VmRSS")
    model(batch).backward()
    optimizer.step()
    return {"peak": resident("VmHWM"), "before": before}


def tokenize(encoder: Any, texts: list[str], max_length: int) -> list[Any]:
    """Tokenize a few texts at a time, to use little memory: in training, other processes tokenize."""
    import numpy as np

    parts = (texts[at : at + 64] for at in range(0, len(texts), 64))
    return [np.array(ids, np.int32) for part in parts for ids in encoder.tokenize(part, max_length)]


def score_peak(args: argparse.Namespace) -> dict[str, float]:
    """Return the memory that InfoNCE and its backward pass add to inputs and gradients."""
    import torch

    from raybge.losses.functional import info_nce

    torch.set_num_threads(args.threads)

    def run(passages: int) -> int:
        generator = torch.Generator().manual_seed(0)
        q_BD = torch.randn(64, 256, generator=generator).div_(16).requires_grad_()  # about unit length
        p_ND = torch.randn(passages, 256, generator=generator).div_(16).requires_grad_()
        target_B = torch.arange(64) * (passages // 64)
        reset_peak()
        before = resident("VmRSS")
        info_nce(q_BD, p_ND, target_B, None, 0.05, block=args.block).mean().backward()
        peak = resident("VmHWM")
        assert q_BD.grad is not None and p_ND.grad is not None and p_ND.grad[-1].any()
        return peak - before - 4 * (q_BD.numel() + p_ND.numel())

    run(4 * (args.block or 256))  # libraries allocate memory of their own at their first call
    return {"added": run(args.passages)}


# --- the measurement --------------------------------------------------------------------------------------------------


def run_process(part: str, args: argparse.Namespace, **flags: Any) -> dict[str, float]:
    """Run a part in a process of its own and return its result."""
    options = {"threads": args.threads, "data": args.data, **flags}
    command = [sys.executable, __file__, "--part", part]
    command += [str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(process.stdout.splitlines()[-1]))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="groups {query, pos}; default: medquad, or random words without it")
    parser.add_argument("--most", type=int, default=GROUPS[1], help="groups of the larger step")
    parser.add_argument("--passages", type=int, default=1_000_000, help="passages of the score part")
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("step", "score"), help=argparse.SUPPRESS)
    parser.add_argument("--groups", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sub_batch_size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(step_peak(args) if args.part == "step" else score_peak(args)))
        return
    few, many = (run_process("step", args, groups=n, sub_batch_size=16)["peak"] for n in (GROUPS[0], args.most))
    whole = run_process("step", args, groups=GROUPS[0])["peak"]
    ratio = many / few
    print(f"step, sub-batches of 16: {GROUPS[0]} groups {few / 1e6:,.0f} MB, {args.most} groups {many / 1e6:,.0f} MB")
    print(f"    ratio {ratio:.3f} (claim: at most {STEP_LIMIT}); {GROUPS[0]} groups at once {whole / 1e6:,.0f} MB")
    blocked = run_process("score", args, passages=args.passages, block=8192)["added"]
    at_once = run_process("score", args, passages=args.passages)["added"]
    print(f"scores of 64 queries and {args.passages:,} passages: in blocks {blocked / 1e6:,.1f} MB added")
    print(f"    (claim: at most {SCORE_LIMIT_MB} MB); all at once {at_once / 1e6:,.1f} MB")
    result = {
        "step_peak_mb": {
            f"{GROUPS[0]} groups, sub-batches": few / 1e6,
            f"{args.most} groups, sub-batches": many / 1e6,
            f"{GROUPS[0]} groups at once": whole / 1e6,
        },
        "step_ratio": round(ratio, 4),
        "step_ratio_limit": STEP_LIMIT,
        "score_added_mb": {"blocks of 8192": blocked / 1e6, "at once": at_once / 1e6},
        "score_limit_mb": SCORE_LIMIT_MB,
        "passages": args.passages,
    }
    common.write_result(result, args.out)
    if ratio > STEP_LIMIT or blocked > SCORE_LIMIT_MB * 1e6:
        raise SystemExit("a claim does not hold")


if __name__ == "__main__":
    main()
