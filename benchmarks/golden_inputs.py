"""Generate the models and data on which golden.py compares checkouts; equal on every machine."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"{a}{b}{c}{d}" for a, b, c, d in itertools.product("bdfgk", "aeiou", "lmnrs", "aeo"))
QUERIES, PASSAGES, TEXTS = 50, 240, 60  # 50 groups in batches of 6: the last step of an epoch has 2 groups


@dataclass(frozen=True)
class Inputs:
    """The folder of the generated models and data files."""

    folder: Path

    def path(self, name: str) -> str:
        """Return the path of a model folder or a data file."""
        return str(self.folder / name)


def generator(name: str) -> np.random.RandomState:
    """Return a random generator seeded by a name. RandomState's streams are equal in every version of numpy."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def write_bert(
    folder: Path,
    kind: str = "BertModel",
    *,
    dropout: float = 0.0,
    hidden: int = 32,
    layers: int = 2,
    std: float = 0.07,
    base: Path | None = None,
    shift: float = 0.1,
) -> Path:
    """Write a random BERT with its tokenizer as a sentence-transformers folder (mean pooling, normalized).

    The weights follow from the folder's name alone. They are drawn by numpy, not by torch, whose streams depend on the
    processor.

    Args:
        folder: where to write.
        kind: class of transformers, for example "BertForMaskedLM".
        dropout: dropout probability of the configuration.
        hidden: width of a vector.
        layers: number of layers.
        std: standard deviation of the weight matrices; small enough for a vector to depend on its words.
        base: folder of a model of the same size whose weights are shifted instead of drawing all of them.
        shift: standard deviation of the shift from `base`.

    Returns:
        The folder.
    """
    import safetensors.numpy
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 32),
        intermediate_size=4 * hidden,
        max_position_embeddings=160,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=1,
        architectures=[kind],
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config, **({"add_pooling_layer": False} if kind == "BertModel" else {}))
    start = safetensors.numpy.load_file(base / "model.safetensors") if base else None
    weights = {}
    for name, parameter in model.named_parameters():
        noise = generator(f"{folder.name} {name}").standard_normal(tuple(parameter.shape))
        if start is not None:
            weights[name] = (start[name] + shift * noise).astype(np.float32)
        elif "LayerNorm.weight" in name:
            weights[name] = (1 + 0.1 * noise).astype(np.float32)
        elif "word_embeddings" in name:
            weights[name] = noise.astype(np.float32)
        else:
            weights[name] = ((std if parameter.dim() > 1 else 0.02) * noise).astype(np.float32)
    config.save_pretrained(folder)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    if kind == "BertModel":
        write_pooling(folder, hidden)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that splits at white space and knows the words of WORDS."""
    import tokenizers
    import transformers

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, **tokens).save_pretrained(
        folder
    )


def write_pooling(folder: Path, width: int) -> None:
    """Write the files by which sentence-transformers pools by the mean and normalizes."""
    names = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": False}))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(random: np.random.RandomState, length: int) -> str:
    """Return a text of so many random words."""
    return " ".join(WORDS[i] for i in random.randint(len(WORDS), size=length))


def write_data(folder: Path, queries: int, passages: int, longest: int) -> None:
    """Write groups, corpus and queries.

    A passage that answers a query contains some of its words. Several groups share passages, some groups have the query
    of another one, and some negatives of a group are positives of the other group with the same query: masking of known
    positives matters. `groups.jsonl` has teacher scores.

    Args:
        folder: where to write.
        queries: number of groups.
        passages: number of passages in the corpus.
        longest: words of the longest passage.
    """
    random = generator("data")
    corpus = [text_of(random, random.randint(longest // 3, longest + 1)) for _ in range(passages)]
    groups: list[dict[str, Any]] = []
    for number in range(queries):
        answers = random.choice(passages, 1 + number % 2, replace=False)
        words = " ".join(corpus[i] for i in answers).split()
        query = " ".join([*random.choice(words, 7), *text_of(random, 1 + number % 3).split()])
        negatives = [corpus[i] for i in random.choice(passages, 3 + number % 4, replace=False) if i not in answers]
        if number % 5 == 4:
            query = groups[-1]["query"]
            negatives[0] = groups[-1]["pos"][0]
        groups.append(
            {
                "query": query,
                "pos": [corpus[i] for i in answers],
                "neg": negatives,
                "pos_scores": (4 + random.standard_normal(len(answers))).round(3).tolist(),
                "neg_scores": random.standard_normal(len(negatives)).round(3).tolist(),
            }
        )
    plain = [{name: row[name] for name in ("query", "pos", "neg")} for row in groups]
    write_rows(folder / "groups.jsonl", groups)
    write_rows(folder / "unscored.jsonl", plain)
    write_rows(folder / "own_no_in_batch_neg.jsonl", plain[: queries // 4])
    write_rows(folder / "examples.jsonl", plain[:4])
    write_rows(folder / "queries.jsonl", [{name: row[name] for name in ("query", "pos")} for row in plain])
    write_rows(folder / "corpus.jsonl", [{"text": text} for text in corpus])
    write_rows(folder / "texts.jsonl", [{"text": text_of(random, random.randint(3, 30))} for _ in range(TEXTS)])


def write_inputs(folder: Path) -> Inputs:
    """Write the small models and data of all cases; equal on every machine."""
    folder.mkdir(parents=True)
    write_data(folder, QUERIES, PASSAGES, 24)
    model = write_bert(folder / "model")
    write_bert(folder / "dropout", dropout=0.1)
    write_bert(folder / "tuned", base=model)
    write_bert(folder / "other", base=model)
    write_bert(folder / "masked", "BertForMaskedLM")
    write_bert(folder / "classifier", "BertForSequenceClassification")
    return Inputs(folder)
