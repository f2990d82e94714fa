"""Random damages of model folders: files that are missing or cut off, settings and tensors that were changed."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import SENTENCE, make_tiny

TEXTS = ["what is a lane", "the text that we read in chunks on one node", "row"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 438\n"
# values by which a setting is replaced: each has another type than some field
ODD = ["16", 1, True, -1, 2.5, [], [3], {}, {"a": 1}, None, "x", 10**9]

# Changes after which a folder is valid in itself and stands for another model, by file and start of the key's path.
OTHER_MODELS = {
    "sentence_bert_config.json": ("max_seq_length",),  # optional: texts up to the model's own length
    "config_sentence_transformers.json": ("prompts", "default_prompt_name"),  # optional: other instructions
    "modules.json": ("2",),  # not normalized
    "tokenizer.json": ("post_processor", "normalizer", "pre_tokenizer", "model"),  # another tokenizer
    # fields with a default of transformers, on which no shape depends: activation, norms, windows, positions
    "config.json": (
        *("hidden_act", "hidden_activation", "activation_function", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
        *("rms_norm_eps", "local_attention", "sliding_window", "use_sliding_window", "max_window_layers"),
        *("layer_types", "global_attn_every_n_layers", "rope_", "partial_rotary_factor", "position_embedding_type"),
        *("pad_token_id", "scale_attn_", "reorder_and_upcast_attn", "is_decoder", "max_position_embeddings"),
    ),
}


@dataclass(frozen=True)
class Damage:
    """A damage: its kind, the file, and of JSON the path of the changed key, of weights the tensor."""

    kind: str
    file: str
    part: str = ""


# --- folders ----------------------------------------------------------------------------------------------------------


def make_folders(place: Path) -> list[Path]:
    """Write one folder of each layout that models come in, and return the folders."""
    return [make(place / make.__name__) for make in (plain, settings, shards, pickled, vocabulary, merges, adapters)]


def plain(folder: Path) -> Path:
    make_tiny(folder, "roberta")
    return folder


def settings(folder: Path) -> Path:
    from raybge.model.folder import FolderSettings, write_settings

    make_tiny(folder, "modernbert")
    prompts = {"query": "what ", "document": "text "}
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, prompts=prompts, max_length=12), 16, {})
    return folder


def shards(folder: Path) -> Path:
    import transformers

    make_tiny(folder, "qwen3")
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def pickled(folder: Path) -> Path:
    """Old layout: weights in a subfolder, as a pickle."""
    import torch
    from safetensors.torch import load_file

    from raybge.model.folder import FolderSettings, write_settings

    inner = folder / "0_Transformer"
    make_tiny(inner, "bert")
    torch.save(load_file(inner / "model.safetensors"), inner / "pytorch_model.bin")
    (inner / "model.safetensors").unlink()
    write_settings(folder, FolderSettings(pooling="cls", normalize=False, max_length=12), 16, {})
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").rename(inner / "sentence_bert_config.json")
    return folder


def vocabulary(folder: Path) -> Path:
    """Tokenizer as a list of words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(SENTENCE.split()), "##s"]
    make_tiny(folder, "bert", vocab_size=len(words), hidden_size=24)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 32}))
    return folder


def merges(folder: Path) -> Path:
    """Tokenizer of bytes as a table of ids and a list of merges."""
    import tokenizers

    core = tokenizers.ByteLevelBPETokenizer()
    core.train_from_iterator([SENTENCE] * 3, vocab_size=330, special_tokens=["<|endoftext|>"], show_progress=False)
    make_tiny(folder, "gpt2", vocab_size=core.get_vocab_size(), n_positions=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    core.save_model(str(folder))
    return folder


def adapters(folder: Path) -> Path:
    from raybge import Encoder
    from raybge.model.lora import Lora

    base = make_tiny(folder.parent / "base", "bert")
    encoder = Encoder(base, devices="cpu", lora=Lora(rank=2))
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    encoder.save(folder)
    return folder


# --- damages ----------------------------------------------------------------------------------------------------------


def damage(folder: Path, dice: random.Random) -> Damage | None:
    """Damage a folder at random, in place, and return what was done; None if nothing was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    kinds: list[tuple[Callable[..., Damage | None], list[Path]]] = [
        (_remove, files),
        (_cut, files),
        (_replace, files),
        (_change_key, [path for path in files if path.suffix == ".json"]),
        (_change_key, [path for path in files if path.suffix == ".json"]),
        (_change_tensor, [path for path in files if path.suffix in (".safetensors", ".bin")]),
    ]
    make, choices = dice.choice(kinds)
    path = dice.choice(choices)
    return make(path, str(path.relative_to(folder)), dice)


def _remove(path: Path, name: str, dice: random.Random) -> Damage:
    path.unlink()
    return Damage("removed", name)


def _cut(path: Path, name: str, dice: random.Random) -> Damage:
    os.truncate(path, dice.randrange(path.stat().st_size))
    return Damage("cut", name)


def _replace(path: Path, name: str, dice: random.Random) -> Damage:
    content = dice.choice([POINTER, "", "[]", "{}", "null", "3", "\0" * 9, "{" * 5000, "\n"])
    path.write_text(content)
    return Damage("replaced", name, content[:9])


def _change_key(path: Path, name: str, dice: random.Random) -> Damage | None:
    content = json.loads(path.read_text())
    places = list(_places(content))
    if not places:
        return None
    parent, key, names = dice.choice(places)
    if dice.random() < 0.4:
        del parent[key]
        kind = "key removed"
    else:
        before = parent[key]
        parent[key] = dice.choice([each for each in ODD if type(each) is not type(before)])
        kind = f"key changed from {before!r:.30} to {parent[key]!r}"
    path.write_text(json.dumps(content))
    return Damage(kind, name, names)


def _places(value: Any, names: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield (parent, key, path) of every value in JSON, except the single tokens of a vocabulary."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        path = f"{names}.{key}".lstrip(".")
        yield value, key, path
        if key not in ("vocab", "merges", "weight_map"):
            yield from _places(each, path)


def _change_tensor(path: Path, name: str, dice: random.Random) -> Damage:
    import torch
    from safetensors.torch import load_file, save_file

    safe = path.suffix == ".safetensors"
    tensors = load_file(path) if safe else torch.load(path)
    key = dice.choice(sorted(tensors))
    tensor = tensors.pop(key)
    kind = dice.choice(["removed", "renamed", "flat", "longer", "nan", "inf"])
    if kind == "renamed":
        tensors[key.replace(".", ".x", 1)] = tensor
    elif kind == "flat":
        tensors[key] = tensor.reshape(1, -1)
    elif kind == "longer":
        tensors[key] = torch.cat([tensor, tensor[:1]])
    elif kind != "removed":
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[dice.randrange(tensor.numel())] = float(kind)
    save_file(tensors, path, {"format": "pt"}) if safe else torch.save(tensors, path)
    return Damage(f"tensor {kind}", name, key)


def is_other_model(done: Damage) -> bool:
    """True if the folder is valid with this change, and only stands for another model."""
    name = Path(done.file).name
    optional = name in ("sentence_bert_config.json", "config_sentence_transformers.json")
    starts = OTHER_MODELS.get(name, ()) if Path(done.file).parent.name != "1_Pooling" else ()
    whole = done.kind in ("removed", "replaced") and optional
    return whole or (done.kind.startswith("key") and done.part.startswith(starts))


# --- outcomes ---------------------------------------------------------------------------------------------------------


def vectors(folder: Path) -> Any:
    """Return the vectors of TEXTS as a query and as a passage."""
    import numpy as np

    from raybge import Encoder

    encoder = Encoder(str(folder), devices="cpu")
    return np.concatenate([encoder.encode_queries(TEXTS), encoder.encode_corpus(TEXTS), encoder.encode(TEXTS)])


def outcome(folder: Path, place: Path, expected: Any, seed: int) -> tuple[Damage | None, str]:
    """Damage a copy of a folder and open it.

    Returns the damage and one of "equal", "refused" and "different"; any other exception than a UserError that names
    the folder is raised.
    """
    import numpy as np

    from raybge.util.errors import UserError

    copy = place / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    done = damage(copy, random.Random(seed))
    try:
        result = vectors(copy)
    except UserError as error:
        assert str(copy) in str(error), error
        return done, "refused"
    except Exception as error:
        raise AssertionError(f"{folder.name}, seed {seed}: {done}") from error
    same = result.shape == expected.shape and np.array_equal(result, expected)
    return done, "equal" if same else "different"
