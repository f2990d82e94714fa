"""Groups per second of a training step: raybge, sentence-transformers and FlagEmbedding, in fp32 and in bf16.

    python benchmarks/train_speed.py --passage_len 256 --groups 32 --out runs/bench/speed-256.json
    python benchmarks/train_speed.py --passage_len 512 --groups 16 --out runs/bench/speed-512.json
    python benchmarks/train_speed.py --device cuda --model bert-base --passage_len 512 --groups 256

A step is forward, backward and AdamW on the same groups of one query, its answer and one negative: the same text, the
same token ids, the same threads, InfoNCE over the whole batch at temperature 0.02, dropout as in
the model's configuration. The time excludes tokenizing. Each peer pads as its own collator does and runs its own model
and loss class:

- raybge: ContrastiveModel;
- sentence-transformers: its data collator's columns, MultipleNegativesRankingLoss;
- FlagEmbedding: its collator's two sides, BiEncoderOnlyEmbedderModel; omitted if it cannot be imported
  (`pip install --no-deps --target DIR FlagEmbedding==1.4.2 peft`, then PYTHONPATH=DIR).

Names that end in "-bf16" run under bf16 autocast, with weights and optimizer in fp32: it is the peers' best documented
configuration on CPUs with AMX, next to the one in which they come.

Before the measurement, the losses of all peers on one batch without dropout must agree. In each round every peer
takes one step on the same batch; medians and their ratios are printed.

For raybge the share of the matrix products in the step's time is printed (torch's profiler), and which share of the
machine's matmul rate in that precision, measured in the same run, the step reaches: the model's operations on tokens
other than padding, divided by the step's time.

On a GPU all steps run under bf16 autocast, and the model is a random BERT-base whose tokens are the text's words:
neither Ray nor faiss nor the MiniLM package is required. `train_commands.py` measures whole commands.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn
from train_peers import PEERS, Batch, Peer

LEARNING_RATE = 2e-5


BF16 = "-bf16"
# Peer, in which precision, and the goal of raybge in the same or in bf16: with passages of 256 tokens, and of 512.
GOALS = {
    ("raybge-bf16", "sentence-transformers"): (4.5, 8.0),
    ("raybge-bf16", "sentence-transformers-bf16"): (3.0, 5.0),
    ("raybge", "sentence-transformers"): (2.2, 3.5),
    ("raybge", "FlagEmbedding"): (2.2, 3.5),
}


# --- text and model ---------------------------------------------------------------------------------------------------


def read_groups(path: str, seed: int) -> list[tuple[str, str, str]]:
    """Return (query, positive, negative) in random order; a row without negatives gets another row's positive."""
    content = common.rows(path) if path else common.random_rows(5000, seed)
    random.Random(seed).shuffle(content)
    positives = [row["pos"] if isinstance(row["pos"], str) else row["pos"][0] for row in content]
    others = positives[1:] + positives[:1]
    return [
        (row["query"], positive, (row.get("neg") or [other])[0])
        for row, positive, other in zip(content, positives, others, strict=True)
    ]


def batches(
    groups: list[tuple[str, str, str]], tokenize: Callable[[Sequence[str], int], list[list[int]]], args: Any
) -> list[Batch]:
    """Return one batch for each round and one to warm up; the passages of a batch differ from each other."""
    result, at = [], 0
    for _ in range(args.rounds + 1):
        rows: list[tuple[str, str, str]] = []
        seen: set[str] = set()
        while len(rows) < args.groups:
            query, *passages = groups[at % len(groups)]
            at += 1
            if len({*passages} | seen) == len(seen) + 2:
                seen |= {*passages}
                rows.append((query, *passages))
        queries, positives, negatives = zip(*rows, strict=True)
        result.append(
            Batch(
                tokenize(queries, args.query_len),
                tokenize(positives, args.passage_len),
                tokenize(negatives, args.passage_len),
            )
        )
    return result


def collator(tokenizer: Any) -> Callable[[list[list[int]]], dict[str, Tensor]]:
    """Return a function that pads to the longest text, as both peers' collators do, with all inputs of the model."""

    def pad(token_ids: list[list[int]]) -> dict[str, Tensor]:
        columns: dict[str, Any] = {"input_ids": token_ids, "attention_mask": [[1] * len(ids) for ids in token_ids]}
        if "token_type_ids" in tokenizer.model_input_names:
            columns["token_type_ids"] = [[0] * len(ids) for ids in token_ids]
        return dict(tokenizer.pad(columns, padding=True, return_tensors="pt"))

    return pad


# --- measure ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Disable dropout within the `with` block."""
    before = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    for module, _ in before:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in before:
            module.p = p


def check_losses(peers: list[Peer], batch: Batch, device: str) -> list[float]:
    """Return the loss of each peer without dropout; stop if they differ: then the peers compute different things."""
    losses = []
    for peer in peers:
        with no_dropout(peer.model), torch.no_grad(), peer.autocast(device):
            losses.append(float(peer.loss(peer.prepare(batch))))
    for peer, loss in zip(peers, losses, strict=True):
        limit = 0.01 * abs(losses[0]) if peer.dtype is None else 0.05 * abs(losses[0]) + 0.02
        if abs(loss - losses[0]) > limit:
            raise SystemExit(f"the peers' losses differ: {dict(zip([p.name for p in peers], losses, strict=True))}")
    return losses


def step(peer: Peer, optimizer: torch.optim.Optimizer, inputs: Any, device: str) -> None:
    """Take one step."""
    with peer.autocast(device):
        loss = peer.loss(inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def time_step(peer: Peer, optimizer: torch.optim.Optimizer, inputs: Any, device: str) -> float:
    """Return the seconds of one step."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    step(peer, optimizer, inputs, device)
    synchronize()
    return time.perf_counter() - start


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the device's operations per second in matrix products, the best of ten measurements."""
    size, synchronize = (8192, torch.cuda.synchronize) if device == "cuda" else (2048, lambda: None)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def share_of_matrix_products(peer: Peer, inputs: Any, device: str) -> float:
    """Return the share of matrix products in the time of a step's operators."""
    optimizer = torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE)
    with torch.profiler.profile() as profile:
        step(peer, optimizer, inputs, device)
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(seconds.get(f"aten::{name}", 0.0) for name in ("mm", "addmm", "bmm", "baddbmm")) / sum(seconds.values())


def operations(config: Any, batch: Batch) -> float:
    """Return the operations of forward and backward (three times forward) on tokens other than padding.

    Counted are linear layers, attention scores and weighted values.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = np.array([len(ids) for ids in batch.texts], np.float64)
    linear = 2 * (4 * hidden**2 + 2 * hidden * inner) * lengths.sum()
    attention = 2 * 2 * hidden * (lengths**2).sum()
    return float(3 * layers * (linear + attention))


def measure(peers: list[Peer], inputs: list[Batch], args: Any) -> dict[str, list[float]]:
    """Return the seconds of each peer's steps, by round."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    optimizers = [torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE) for peer in peers]
    for number, batch in enumerate(inputs):
        for peer, optimizer in zip(peers, optimizers, strict=True):
            peer.model.train()
            duration = time_step(peer, optimizer, peer.prepare(batch), args.device)
            if number:  # the first warms up
                seconds[peer.name].append(duration)
        if number:
            print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), flush=True)
    return seconds


def summary(
    peers: list[Peer], seconds: dict[str, list[float]], inputs: list[Batch], args: Any, config: Any
) -> dict[str, Any]:
    """Print and return medians, rates and ratios."""
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    tokens = statistics.mean(sum(map(len, batch.texts)) for batch in inputs[1:])
    work = statistics.mean(operations(config, batch) for batch in inputs[1:])
    rates = {dtype: matmul_rate(args.device, dtype) for dtype in {peer.dtype or torch.float32 for peer in peers}}
    result: dict[str, Any] = {"tokens_a_step": tokens, "peers": {}}
    for peer in peers:
        median, rate = medians[peer.name], rates[peer.dtype or torch.float32]
        result["peers"][peer.name] = {
            "seconds": [round(s, 4) for s in seconds[peer.name]],
            "median": round(median, 4),
            "groups_per_second": round(args.groups / median, 3),
            "tokens_per_second": round(tokens / median, 1),
            "matmul_gflops": rate / 1e9,
            "share_of_matmul_rate": round(work / median / rate, 4),
        }
        line = f"{peer.name:>26}: {median:8.3f} s a step  {tokens / median:10,.0f} tokens/s"
        print(f"{line}  {work / median / rate:6.1%} of {rate / 1e9:,.0f} GFLOP/s")
        if peer.name.startswith("raybge") and args.device == "cpu":
            share = share_of_matrix_products(peer, peer.prepare(inputs[0]), args.device)
            result["peers"][peer.name]["share_of_matrix_products"] = round(share, 4)
            print(f"{'':>26}  {share:.1%} of its time are matrix products")
    return result


def claims(medians: dict[str, float], args: Any) -> list[common.Claim]:
    """Return the ratios of the medians."""
    lines = []
    setting = f"a step of {args.groups} x ({args.query_len} + 2 x {args.passage_len})"
    for (ours, peer), goals in GOALS.items():
        if ours in medians and peer in medians:
            goal = {256: goals[0], 512: goals[1]}.get(args.passage_len) if args.device == "cpu" else 2.0
            lines.append(common.Claim(f"{setting}: {ours} against {peer}", medians[peer] / medians[ours], goal))
    return lines


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="groups {query, pos, neg}; default: medquad, or random words without it")
    parser.add_argument(
        "--model", default=None, help="folder, or bert-base: with random weights; default: MiniLM, on the CPU"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--query_len", type=int, default=64)
    parser.add_argument("--passage_len", type=int, default=256)
    parser.add_argument("--groups", type=int, default=32, help="groups of 2 passages per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    names = [*PEERS, *(name + BF16 for name in PEERS if name != "FlagEmbedding")]
    parser.add_argument("--peers", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.data = args.data or common.medquad("train.jsonl.gz")
    model = args.model or ("bert-base" if args.device == "cuda" else common.minilm())
    with tempfile.TemporaryDirectory() as scratch:
        if model == "bert-base":
            common.random_bert(Path(scratch))
            folder = scratch
        else:
            folder = model
        result = run(folder, model, args)
    medians = {name: each["median"] for name, each in result["peers"].items()}
    common.write_result({"model": model, "settings": vars(args), **result}, args.out, claims(medians, args))


def run(folder: str, model: str, args: Any) -> dict[str, Any]:
    """Build the peers, check their losses and measure their steps."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    groups = read_groups(args.data, args.seed)
    if model == "bert-base":
        groups = [(common.number_words(q), common.number_words(p), common.number_words(n)) for q, p, n in groups]

    def tokenize(texts: Sequence[str], max_length: int) -> list[list[int]]:
        return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]

    inputs = batches(groups, tokenize, args)
    pad = collator(tokenizer)
    peers = []
    for name in args.peers:
        if args.device == "cuda" and name.endswith(BF16):
            continue  # all steps are in bf16
        dtype = torch.bfloat16 if args.device == "cuda" or name.endswith(BF16) else None
        try:
            peer = PEERS[name.removesuffix(BF16)](folder, args.device, pad, dtype)
        except ImportError as error:
            print(f"{name} is omitted: {error}")
            continue
        peer.name, peer.dtype = name, dtype
        peer.model.train()
        peers.append(peer)
    losses = check_losses(peers, inputs[0], args.device)
    print(f"the same loss without dropout: {', '.join(f'{loss:.5f}' for loss in losses)}")
    return summary(peers, measure(peers, inputs, args), inputs, args, config)


if __name__ == "__main__":
    main()
