"""Groups per second of a training step: raybge, sentence-transformers and FlagEmbedding.

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

Before the measurement, the losses of all peers on one batch without dropout must agree. In each round every peer
takes one step on the same batch; medians and their ratios are printed.

On a GPU the step runs under bf16 autocast, and the model is a random BERT-base whose tokens are the text's words:
neither Ray nor faiss nor the MiniLM package is required. The share of the GPU's matmul rate, measured in the same run,
is printed too: the model's operations on tokens other than padding, divided by the step's time.

With --command the whole `raybge.train` command is measured as well, by its `train_samples_per_second`.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn

TEMPERATURE = 0.02
LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Batch:
    """Token ids of B queries, their B positives and B negatives."""

    queries: list[list[int]]
    positives: list[list[int]]
    negatives: list[list[int]]

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of all texts."""
        return self.queries + self.positives + self.negatives


@dataclass
class Peer:
    """A model in training: `loss` takes the result of `prepare` for a batch."""

    name: str
    model: nn.Module
    prepare: Callable[[Batch], Any]
    loss: Callable[[Any], Tensor]


# --- the peers --------------------------------------------------------------------------------------------------------


def raybge_peer(folder: str, device: str, _: Any) -> Peer:
    """Build raybge's model and loss."""
    from raybge.data.step_batch import Groups, StepBatch
    from raybge.losses.contrastive_model import ContrastiveModel
    from raybge.losses.objective import Objective
    from raybge.model.encoder import Encoder
    from raybge.model.packing import prepare_for_training

    embedding = Encoder(folder, use_fp16=False, devices=device, normalize_embeddings=True, pooling_method="mean").model
    prepare_for_training(embedding, torch.bfloat16 if device == "cuda" else None)
    model = ContrastiveModel(embedding, Objective(TEMPERATURE), None)

    def prepare(batch: Batch) -> StepBatch:
        groups = len(batch.queries)
        passages = [p for pair in zip(batch.positives, batch.negatives, strict=True) for p in pair]
        keys_M = np.arange(2 * groups)  # all texts differ
        return StepBatch(
            step=0,
            rows=[(0, i) for i in range(groups)],
            token_ids=[np.array(ids, np.int32) for ids in batch.queries + passages],
            groups=Groups(
                passages_B=np.full(groups, 2, np.int64),
                passage_key_M=keys_M,
                known_B=np.ones(groups, np.int64),
                known_key_R=keys_M[::2],
            ),
        )

    return Peer("raybge", model, prepare, model)


def sentence_transformers_peer(folder: str, device: str, pad: Callable[[list[list[int]]], dict[str, Tensor]]) -> Peer:
    """Build the model and loss of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(folder, device=device)
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)

    def prepare(batch: Batch) -> list[dict[str, Tensor]]:
        return [pad(column) for column in (batch.queries, batch.positives, batch.negatives)]

    def run(columns: list[dict[str, Tensor]]) -> Tensor:
        return loss([{name: x.to(device) for name, x in column.items()} for column in columns], None)

    return Peer("sentence-transformers", model, prepare, run)


def flag_embedding_peer(folder: str, device: str, pad: Callable[[list[list[int]]], dict[str, Tensor]]) -> Peer:
    """Build FlagEmbedding's model, which computes its loss."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel
    from transformers import AutoModel

    base = AutoModel.from_pretrained(folder)
    model = BiEncoderOnlyEmbedderModel(
        base, temperature=TEMPERATURE, sentence_pooling_method="mean", normalize_embeddings=True
    ).to(device)

    def prepare(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        passages = [p for pair in zip(batch.positives, batch.negatives, strict=True) for p in pair]
        return pad(batch.queries), pad(passages)

    def run(sides: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        queries, passages = ({name: x.to(device) for name, x in side.items()} for side in sides)
        return model(queries=queries, passages=passages).loss

    return Peer("FlagEmbedding", model, prepare, run)


PEERS = {
    "raybge": raybge_peer,
    "sentence-transformers": sentence_transformers_peer,
    "FlagEmbedding": flag_embedding_peer,
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


def check_losses(peers: list[Peer], batch: Batch, precision: Any, tolerance: float) -> list[float]:
    """Return the loss of each peer without dropout; stop if they differ: then the peers compute different things."""
    losses = []
    for peer in peers:
        with no_dropout(peer.model), torch.no_grad(), precision():
            losses.append(float(peer.loss(peer.prepare(batch))))
    if max(losses) - min(losses) > tolerance * abs(losses[0]):
        raise SystemExit(f"the peers' losses differ: {dict(zip([p.name for p in peers], losses, strict=True))}")
    return losses


def time_step(peer: Peer, optimizer: torch.optim.Optimizer, inputs: Any, precision: Any) -> float:
    """Return the seconds of one step."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    with precision():
        loss = peer.loss(inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def matmul_rate(size: int = 8192) -> float:
    """Return the GPU's operations per second in bf16 matrix products, the best of ten measurements."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def operations(config: Any, batch: Batch) -> float:
    """Return the operations of forward and backward (three times forward) on tokens other than padding.

    Counted are linear layers, attention scores and weighted values.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = np.array([len(ids) for ids in batch.texts], np.float64)
    linear = 2 * (4 * hidden**2 + 2 * hidden * inner) * lengths.sum()
    attention = 2 * 2 * hidden * (lengths**2).sum()
    return float(3 * layers * (linear + attention))


def measure(peers: list[Peer], inputs: list[Batch], args: Any, precision: Any) -> dict[str, list[float]]:
    """Return the seconds of each peer's steps, by round."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    optimizers = [torch.optim.AdamW(peer.model.parameters(), lr=LEARNING_RATE) for peer in peers]
    for number, batch in enumerate(inputs):
        for peer, optimizer in zip(peers, optimizers, strict=True):
            peer.model.train()
            duration = time_step(peer, optimizer, peer.prepare(batch), precision)
            if number:  # the first warms up
                seconds[peer.name].append(duration)
        if number:
            print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), flush=True)
    return seconds


def command_rate(folder: str, args: Any) -> float:
    """Return the train_samples_per_second of the whole command on the same file."""
    with tempfile.TemporaryDirectory() as output:
        flags = {
            "model_name_or_path": folder,
            "train_data": args.data,
            "output_dir": f"{output}/out",
            "per_device_train_batch_size": args.groups,
            "train_group_size": 2,
            "query_max_len": args.query_len,
            "passage_max_len": args.passage_len,
            "max_steps": args.rounds + 1,
            "num_workers": 1,
            "cpus_per_worker": args.threads,
            "save_strategy": "no",
        }
        command = [sys.executable, "-m", "raybge.train", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
        subprocess.run(command, check=True)
        return float(json.loads(Path(f"{output}/out/train_results.json").read_text())["train_samples_per_second"])


def summary(seconds: dict[str, list[float]], inputs: list[Batch], args: Any, config: Any) -> dict[str, Any]:
    """Print and return medians, rates and ratios."""
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    tokens = statistics.mean(sum(map(len, batch.texts)) for batch in inputs[1:])
    work = statistics.mean(operations(config, batch) for batch in inputs[1:])
    card = matmul_rate() if args.device == "cuda" else None
    result: dict[str, Any] = {"tokens_a_step": tokens, "matmul_tflops": card and card / 1e12, "peers": {}}
    for name, median in medians.items():
        result["peers"][name] = {
            "seconds": [round(s, 4) for s in seconds[name]],
            "median": round(median, 4),
            "groups_per_second": round(args.groups / median, 3),
            "tokens_per_second": round(tokens / median, 1),
            "times_slower_than_raybge": round(median / medians["raybge"], 3),
            "share_of_matmul_rate": card and round(work / median / card, 4),
        }
        line = f"{name:>22}: {args.groups / median:8.2f} groups/s  {tokens / median:10,.0f} tokens/s"
        if card:
            line += f"  {work / median / card:6.1%} of {card / 1e12:.0f} TFLOP/s"
        print(f"{line}  raybge is {median / medians['raybge']:.2f} times as fast")
    return result


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
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--command", action="store_true", help="measure the command `raybge.train` too")
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
    common.write_result({"model": model, "settings": vars(args), **result}, args.out)


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

    def precision() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else contextlib.nullcontext()

    inputs = batches(groups, tokenize, args)
    pad = collator(tokenizer)
    peers = []
    for name in args.peers:
        try:
            peers.append(PEERS[name](folder, args.device, pad))
        except ImportError as error:
            print(f"{name} is omitted: {error}")
    for peer in peers:
        peer.model.train()
    losses = check_losses(peers, inputs[0], precision, 0.01 if args.device == "cpu" else 0.05)
    print(f"the same loss without dropout: {', '.join(f'{loss:.5f}' for loss in losses)}")
    result = summary(measure(peers, inputs, args, precision), inputs, args, config)
    if args.command:
        result["command_groups_per_second"] = command_rate(folder, args)
        print(f"{'raybge.train':>22}: {result['command_groups_per_second']:8.2f} groups/s")
    return result


if __name__ == "__main__":
    main()
