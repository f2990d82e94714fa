"""Tokens per second and peak memory on one GPU: raybge and sentence-transformers, as it comes and at its best.

    python benchmarks/gpu.py --out runs/bench/gpu.json
    python benchmarks/gpu.py --device cpu --lengths 16 --groups 2 --rounds 1

Neither Ray nor faiss is required. The model is a random BERT-base, texts are random tokens of a quarter of the length
up to all of it. For each length:

- train: forward, backward and AdamW of a batch of groups of one query and two passages, under bf16 autocast, without
  tokenizing. «At its best» is the same model with FlashAttention 2, which runs on texts without padding, if flash-attn
  is installed.
- encode: vectors of the same texts, with tokenizing. raybge and «at its best» have fp16 weights, the latter with
  FlashAttention 2 if flash-attn is installed; «as it comes» is fp32. «raybge, tokens ready» is what an actor does whose
  tokens CPU tasks have made; the line «one thread tokenizes» says how many of these tasks it takes.
- waits: how often the host waits for the GPU in a training step of raybge, and the share of the step in which the GPU
  has nothing to do. On a CPU the host's own cost of an attention call on packed texts, whose kernels do nothing there,
  is all that can be measured.

Peers take turns in each round. Printed are medians, the ratio to raybge, the share of the GPU's matmul rate (measured
in the same run) and the peak of allocated memory. `python -m raybge.selftest` checks that the numbers are right.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from train_speed import LEARNING_RATE, Batch, Peer, collator, matmul_rate, operations, raybge_peer, time_step
from train_speed import sentence_transformers_peer as st_peer

TRAINED, ENCODED = "train", "encode"
Measured = dict[str, Any]


def random_batch(length: int, groups: int, seed: int) -> Batch:
    """Return texts of random tokens; a query is a quarter as long as a passage."""
    generator = np.random.default_rng(seed)

    def texts(longest: int) -> list[list[int]]:
        lengths = generator.integers(max(2, longest // 4), longest + 1, groups)
        return [generator.integers(1000, common.WORDS, n).tolist() for n in lengths]

    return Batch(texts(max(2, length // 4)), texts(length), texts(length))


def measure_calls(calls: dict[str, Callable[[], float]], rounds: int, device: str) -> dict[str, Measured]:
    """Return seconds and peak memory of each call, by name; each warms up once and they take turns.

    Args:
        calls: functions that return their seconds.
        rounds: number of measurements of each.
        device: "cuda" or "cpu", where memory is not measured.
    """
    results: dict[str, Measured] = {name: {"seconds": [], "peak_gb": None} for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = call()
            if number:
                results[name]["seconds"].append(round(seconds, 5))
            if number and device == "cuda":
                results[name]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return results


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, with what it leaves running on the GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def training_calls(folder: str, batch: Batch, args: Any) -> dict[str, Callable[[], float]]:
    """Return a training step of each peer."""
    pad = collator(transformers.AutoTokenizer.from_pretrained(folder))
    peers = [raybge_peer(folder, args.device, pad), st_peer(folder, args.device, pad)]
    if args.device == "cuda" and importlib.util.find_spec("flash_attn"):
        best = st_peer(folder, args.device, pad)
        best.model[0].auto_model.set_attn_implementation("flash_attention_2")
        peers.append(Peer("sentence-transformers at its best", best.model, best.prepare, best.loss))
    precision = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.device == "cuda")
    calls = {}
    for peer in peers:
        peer.model.train()
        optimizer = torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE, fused=args.device == "cuda")
        calls[peer.name] = partial(time_step, peer, optimizer, peer.prepare(batch), precision)
    return calls


def encoding_calls(folder: str, batch: Batch, args: Any) -> dict[str, Callable[[], float]]:
    """Return the encoding of the batch's texts by each peer."""
    from sentence_transformers import SentenceTransformer

    from raybge.model.encoder import Encoder

    words = [" ".join(str(token - 4) for token in text[2:]) for text in batch.texts]  # the tokenizer adds two tokens
    encoder = Encoder(folder, devices=args.device, pooling_method="mean")
    ready = [np.array(ids, np.int32) for ids in encoder.tokenize(words, encoder.passage_max_length)]
    functions: dict[str, Callable[[], Any]] = {
        "raybge": partial(encoder.encode, words),
        "raybge, tokens ready": partial(encoder.encode_token_ids, ready, encoder.passage_max_length),
        "one thread tokenizes": partial(tokenize_in_one_thread, encoder, words),
    }
    plain = SentenceTransformer(folder, device=args.device)
    functions["sentence-transformers"] = partial(plain.encode, words, batch_size=128)
    if args.device == "cuda":
        options: dict[str, Any] = {"dtype": torch.float16}
        if importlib.util.find_spec("flash_attn"):
            options["attn_implementation"] = "flash_attention_2"
        best = SentenceTransformer(folder, device=args.device, model_kwargs=options)
        functions["sentence-transformers at its best"] = partial(best.encode, words, batch_size=128)
    return {name: partial(seconds_of, function, args.device) for name, function in functions.items()}


def tokenize_in_one_thread(encoder: Any, texts: list[str]) -> None:
    """Tokenize texts like a Ray task of one CPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        encoder.tokenize(texts, encoder.passage_max_length)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]


def print_waits(call: Callable[[], float], length: int) -> Measured:
    """Print how often the host waits for the GPU in a training step, and how long the GPU is idle."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds = call()
    events = profiler.key_averages()
    waits = sum(event.count for event in events if event.key in ("cudaStreamSynchronize", "cudaEventSynchronize"))
    idle = max(0.0, 1 - sum(event.self_device_time_total for event in events) / 1e6 / seconds)
    print(f"waits  {length:>5} tokens  a step waits {waits} times for the GPU, which is idle for {idle:.0%} of it")
    return {"kind": "waits", "length": length, "waits": waits, "idle": round(idle, 4)}


def print_host_cost(texts: int = 16, tokens: int = 8, calls: int = 300) -> Measured:
    """Print the host's time of an attention call on packed texts, whose kernel does nothing; CPU time of one thread."""
    from raybge.compat.torch import flash_attention

    def forward(q: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        seed = torch.zeros((), dtype=torch.uint64)
        return torch.empty_like(q), q.new_zeros(q.shape[1], len(q), dtype=torch.float32), seed, seed, q.new_empty(0)

    def backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    q, k, v = (torch.zeros(texts * tokens, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bounds = torch.arange(0, texts * tokens + 1, tokens, dtype=torch.int32)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        times = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(calls):
                flash_attention(q, k, v, bounds, tokens, 0.0, None, False).sum().backward()
            times.append((time.process_time() - start) / calls * 1e6)
    print(f"host: {min(times):.0f} microseconds for an attention call on packed texts and its gradient")
    return {"kind": "host", "microseconds": round(min(times), 1)}


def table(kind: str, length: int, results: dict[str, Measured], tokens: int, work: float, rate: float | None) -> None:
    """Complete the results with rates, and print a line for each peer."""
    medians = {name: statistics.median(result["seconds"]) for name, result in results.items()}
    for name, result in results.items():
        result["tokens_per_second"] = round(tokens / medians[name])
        result["times_slower_than_raybge"] = round(medians[name] / medians["raybge"], 3)
        result["share_of_matmul_rate"] = rate and round(work / medians[name] / rate, 4)
        share = "" if rate is None else f"  {result['share_of_matmul_rate']:6.1%} of matmul"
        peak = "" if result["peak_gb"] is None else f"  {result['peak_gb']:6.2f} GB"
        print(
            f"{kind:<7}{length:>5} tokens  {name:<34}{result['tokens_per_second']:>12,} tokens/s"
            f"  raybge is {result['times_slower_than_raybge']:.2f} times as fast{share}{peak}",
            flush=True,
        )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512], help="longest passages, in tokens")
    parser.add_argument("--groups", type=int, default=256, help="groups of a query and two passages in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = matmul_rate() if args.device == "cuda" else None
    if rate:
        print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bf16 matrix products")
    results = [] if args.device == "cuda" else [print_host_cost()]
    with tempfile.TemporaryDirectory() as folder:
        common.random_bert(Path(folder))
        config = transformers.AutoConfig.from_pretrained(folder)
        for length in args.lengths:
            batch = random_batch(length, args.groups, seed=length)
            tokens, work = sum(map(len, batch.texts)), operations(config, batch)
            for kind, build, share in ((TRAINED, training_calls, 1.0), (ENCODED, encoding_calls, 1 / 3)):
                calls = build(folder, batch, args)
                peers = measure_calls(calls, args.rounds, args.device)
                if kind == TRAINED and args.device == "cuda":
                    results.append(print_waits(calls["raybge"], length))
                table(kind, length, peers, tokens, work * share, rate)
                results.append({"kind": kind, "length": length, "tokens": tokens, "peers": peers})
    common.write_result({"settings": vars(args), "matmul_tflops": rate and rate / 1e12, "results": results}, args.out)


if __name__ == "__main__":
    main()
