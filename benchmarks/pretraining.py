"""Gain of RetroMAE: a small BERT fine-tuned after pre-training on medquad's answers, and fine-tuned from scratch.

    python benchmarks/pretraining.py --steps 300 --out runs/bench/pretraining.json

A BERT of 4 layers of 256 with 8,000 word pieces of the corpus starts with random weights. For each seed, one copy is
pre-trained from scratch for --steps steps (`raybge.pretrain` on the corpus), then both are fine-tuned for 100 steps
with the same groups (`raybge.train`, negatives from the batch) and measured on dev queries (`raybge.evaluate`), each at
every learning rate of --rates, of which the best result counts. The model with random weights is measured without any
training too, since its vectors depend on the words of a text.

The claim: the nDCG@10 of the pre-trained model is higher for every seed, and by at least 0.02 on average.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

METRIC, MARGIN = "nDCG@10", 0.02
LAYERS, WIDTH, WORDS, TUNING_STEPS = 4, 256, 8_000, 100


def fresh_model(args: argparse.Namespace, folder: Path, seed: int) -> str:
    """Write a random BERT with a tokenizer that was trained on the corpus, and return its folder."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    core = BertWordPieceTokenizer()
    texts = (row["text"] for row in common.rows(str(common.medquad("corpus.jsonl.gz"))))
    core.train_from_iterator(texts, vocab_size=WORDS, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=core._tokenizer)
    torch.manual_seed(seed)
    size = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    size |= {"initializer_range": args.weights, "hidden_dropout_prob": args.dropout}
    config = BertConfig(vocab_size=len(tokenizer), attention_probs_dropout_prob=args.dropout, **size)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(name: str, **flags: Any) -> None:
    """Run a command of raybge."""
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    subprocess.run([sys.executable, "-m", f"raybge.{name}", *words], check=True)


def pretrain(args: argparse.Namespace, fresh: str, output: Path, seed: int) -> str:
    """Pre-train on the corpus and return the encoder's folder."""
    command(
        "pretrain",
        config_name=fresh,
        tokenizer_name=fresh,
        train_data=common.medquad("corpus.jsonl.gz"),
        output_dir=output,
        max_seq_length=args.length,
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        seed=seed,
        save_strategy="no",
        num_workers=1,
        cpus_per_worker=args.threads,
    )
    return str(output / "encoder_model")


def fine_tune(args: argparse.Namespace, model: str, work: Path, name: str, seed: int, rate: float) -> float:
    """Fine-tune a model and return its nDCG@10."""
    output = work / name
    command(
        "train",
        model_name_or_path=model,
        train_data=common.medquad("train.jsonl.gz"),
        output_dir=output,
        sentence_pooling_method="cls",
        train_group_size=2,
        query_max_len=32,
        passage_max_len=args.length,
        per_device_train_batch_size=32,
        max_steps=TUNING_STEPS,
        learning_rate=rate,
        seed=seed,
        save_strategy="no",
        num_workers=1,
        cpus_per_worker=args.threads,
    )
    return evaluate(args, str(output), work / f"{name}.json")


def evaluate(args: argparse.Namespace, model: str, metrics: Path) -> float:
    """Return the nDCG@10 of the dev queries in the corpus."""
    command(
        "evaluate",
        encoder=model,
        corpus_data=common.medquad("corpus.jsonl.gz"),
        query_data=common.medquad("dev.jsonl.gz"),
        max_query_length=32,
        max_passage_length=args.length,
        k=10,
        metrics_file=metrics,
    )
    return float(json.loads(metrics.read_text())[METRIC])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--work", default="runs/bench/pretraining", help="folder for the models; its content is deleted"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 3e-4], help="learning rates of fine-tuning")
    parser.add_argument("--weights", type=float, default=0.02, help="standard deviation of the random weights")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if common.medquad("corpus.jsonl.gz") is None:
        raise SystemExit(f"medquad is not at {common.MEDQUAD}")
    work = Path(args.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        place = work / f"{seed}"
        fresh = fresh_model(args, place / "fresh", seed)
        start = time.monotonic()
        encoder = pretrain(args, fresh, place / "pretrained", seed)
        seconds = time.monotonic() - start
        models = {"pretrained": encoder, "scratch": fresh}
        by_rate = {
            name: {rate: fine_tune(args, model, place, f"{name}-{rate}", seed, rate) for rate in args.rates}
            for name, model in models.items()
        }
        best = {name: max(values.values()) for name, values in by_rate.items()}
        random = evaluate(args, fresh, place / "random.json")
        results.append({**best, "random": random, "by_rate": by_rate, "seconds": seconds})
        print(
            f"seed {seed}: {METRIC} from scratch {best['scratch']:.4f}, pre-trained {best['pretrained']:.4f}, ", end=""
        )
        print(f"random weights {random:.4f} ({seconds:.0f} s of pre-training)", flush=True)
    gains = [each["pretrained"] - each["scratch"] for each in results]
    holds = min(gains) > 0 and statistics.mean(gains) >= MARGIN
    print(f"gain: {statistics.mean(gains):+.4f} on average, {min(gains):+.4f} at least (claim: {MARGIN} and above 0)")
    common.write_result({"settings": vars(args), "by_seed": results, "holds": holds}, args.out)
    if not holds:
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
