"""Checks of a loaded model: finite weights, all layers used, token ids within the embeddings, words that are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from damages import adapters, merges
from safetensors.torch import load_file, save_file
from tiny import SENTENCE, WORDS, make_classifier, make_tiny

from raybge import Encoder
from raybge.losses.retromae_loading import load_pretraining_model
from raybge.merging.alignment import AlignedModels
from raybge.model.loaded_checks import check_finite, unknown_share
from raybge.model.reranker import Reranker
from raybge.util.errors import UserError

WORDS_NAME, LAST = "embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"


def change(folder: str | Path, file: str = "model.safetensors", **tensors: torch.Tensor | None) -> None:
    path = Path(folder) / file
    weights = {name.replace("__", "."): each for name, each in tensors.items()}
    save_file({n: each for n, each in {**load_file(path), **weights}.items() if each is not None}, path)


def configure(folder: str | Path, **fields) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def add_tokens(folder: str | Path, *tokens: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WORDS_NAME, LAST, "pooler.dense.weight"])
def test_weights_that_are_not_finite_are_errors(tiny, value, name):
    folder = tiny()
    tensor = load_file(f"{folder}/model.safetensors")[name]
    tensor.view(-1)[3] = value
    change(folder, **{name: tensor})
    with pytest.raises(UserError, match=f"the model {folder}: 1 of {tensor.numel():,} numbers of {name} are NaN"):
        Encoder(folder, devices="cpu")


def test_every_way_to_open_a_model_checks_its_weights(tmp_path):
    broken = {}
    for kind, name in (("bert", LAST), ("classifier", "classifier.bias"), ("masked", "cls.predictions.bias")):
        folder = tmp_path / kind
        make_classifier(folder) if kind == "classifier" else make_tiny(
            folder, head=kind == "masked", mask=kind == "masked"
        )
        tensor = load_file(folder / "model.safetensors")[name]
        change(folder, **{name: torch.full_like(tensor, torch.nan)})
        broken[kind] = str(folder)
    whole = make_tiny(tmp_path / "whole")
    for opening in (
        lambda: Encoder(broken["bert"], devices="cpu"),
        lambda: Reranker(broken["classifier"], devices="cpu"),
        lambda: load_pretraining_model(broken["masked"]),
        lambda: AlignedModels([whole, broken["bert"]], "encoder"),
        lambda: AlignedModels([broken["bert"], whole], "encoder"),
        lambda: Encoder(whole, devices="cpu").load_weights(broken["bert"]),
    ):
        with pytest.raises(UserError, match="are NaN or infinite"):
            opening()


def test_adapters_that_are_not_finite_or_not_whole_are_errors(tmp_path):
    folder = adapters(tmp_path / "adapters")
    file = "adapter_model.safetensors"
    name, tensor = sorted(load_file(folder / file).items())[0]
    change(folder, file, **{name: torch.full_like(tensor, torch.nan)})
    with pytest.raises(UserError, match=f"the model {folder}: .* are NaN or infinite"):
        Encoder(str(folder), devices="cpu")
    change(folder, file, **{name: None})
    with pytest.raises(UserError, match=rf"the adapters of {folder} do not fit .*{name} \(1 in total\)"):
        Encoder(str(folder), devices="cpu")


def test_finite_numbers_whose_sum_overflows_are_accepted():
    large = torch.full((4, 4), 3e38)
    assert torch.isinf(large.sum())
    check_finite("m", {"a": large, "b": large.half().clamp(max=65504), "c": torch.arange(3), "d": torch.empty(0)})
    with pytest.raises(UserError, match="16 of 16 numbers of e"):
        check_finite("m", {"e": large.half()})


@pytest.mark.parametrize(
    ("kind", "field"), [("bert", "num_hidden_layers"), ("gpt2", "n_layer"), ("distilbert", "n_layers")]
)
@pytest.mark.parametrize("layers", [1, 0])
def test_weights_of_unused_layers_are_errors(tiny, kind, field, layers):
    folder = tiny(kind)
    configure(folder, **{field: layers})
    with pytest.raises(UserError, match=rf"{folder} has weights that its config.json has no layers for"):
        Encoder(folder, devices="cpu")


@pytest.mark.parametrize(
    ("kind", "field"), [("bert", "num_attention_heads"), ("gpt2", "n_head"), ("distilbert", "n_heads")]
)
def test_missing_number_of_heads_is_an_error(tiny, kind, field):
    folder = tiny(kind)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != field}))
    with pytest.raises(UserError, match=f"config.json of {folder}: {field} is missing"):
        Encoder(folder, devices="cpu")


# --- token ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2", "qwen3"])
def test_added_tokens_without_embeddings_are_errors(tiny, kind):
    folder = tiny(kind)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    add_tokens(folder, *(f"new{i}" for i in range(64 - size)))
    Encoder(folder, devices="cpu")  # the last id is the table's last
    add_tokens(folder, "beyond")
    with pytest.raises(UserError, match=r"has the token 'beyond' with the id 64, .* for ids below 64 \(1 tokens"):
        Encoder(folder, devices="cpu")


def test_every_way_to_open_a_model_checks_token_ids(tmp_path):
    bert, large = make_tiny(tmp_path / "bert", mask=True), make_tiny(tmp_path / "large", vocab_size=100, mask=True)
    add_tokens(large, *(f"new{i}" for i in range(60)))
    classifier = make_classifier(tmp_path / "classifier")
    add_tokens(classifier, *(f"new{i}" for i in range(60)))
    saved = str(adapters(tmp_path / "adapters"))
    add_tokens(saved, *(f"new{i}" for i in range(60)))
    for opening in (
        lambda: Encoder(bert, tokenizer_name=large, devices="cpu"),
        lambda: Encoder(saved, devices="cpu"),
        lambda: Reranker(classifier, devices="cpu"),
        lambda: load_pretraining_model(bert, tokenizer_name=large),
        lambda: load_pretraining_model(config_name=bert, tokenizer_name=large),
    ):
        with pytest.raises(UserError, match="with the id 64, the model .* has embeddings for ids below 64"):
            opening()
    Encoder(large, devices="cpu")


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "qwen3", "distilbert"])
def test_negative_padding_id_is_none(tiny, kind):
    folder = tiny(kind)
    configure(folder, pad_token_id=None)
    expected = Encoder(folder, devices="cpu")
    configure(folder, pad_token_id=-1)
    encoder = Encoder(folder, devices="cpu")
    # torch would take -1 for the last row, which then is not trained
    assert encoder.model.backbone.get_input_embeddings().padding_idx is None
    texts = ["what is a lane", "row"]
    np.testing.assert_array_equal(encoder.encode(texts), expected.encode(texts))


@pytest.mark.parametrize(("kind", "pad"), [("roberta", -1), ("bert", 64), ("roberta", 64), ("llama", 64), ("gpt2", 99)])
def test_padding_id_without_meaning_is_an_error(tiny, kind, pad):
    folder = tiny(kind)
    configure(folder, pad_token_id=pad)
    with pytest.raises(UserError, match=rf"config.json of {folder}: pad_token_id is {pad}: .* from 0 to 63"):
        Encoder(folder, devices="cpu")


# --- words ------------------------------------------------------------------------------------------------------------


def test_share_of_unknown_words(tiny, tmp_path):
    def tokenizer(folder):
        return transformers.AutoTokenizer.from_pretrained(folder)

    bert = tokenizer(tiny())
    assert unknown_share(bert, [SENTENCE]) == 0
    assert unknown_share(bert, ["what zebra", "is zebra zebra zebra"]) == 4 / 6
    assert unknown_share(bert, ["Ärger über Öl"]) == 1
    assert unknown_share(bert, []) == unknown_share(bert, [""]) == 0
    assert unknown_share(tokenizer(merges(tmp_path / "bytes")), ["zebra Öl 你好"]) == 0  # bytes are always known


def test_share_of_unknown_words_of_sentencepiece():
    """A word of an unknown script is a word mark and an unknown token; one odd letter does not make a word unknown."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert unknown_share(tokenizer, ["лес река", "forest"]) == 2 / 3
    assert unknown_share(tokenizer, ["straße river"]) == 0


def test_share_of_unknown_words_of_a_slow_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow = transformers.BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")
    assert not slow.is_fast
    assert unknown_share(slow, ["what is zebra zebra"]) == 0.5


def test_unused_weights_of_a_layer_that_exists_pass(tiny):
    """Such as buffers that old versions of transformers saved."""
    folder = tiny("bert")
    path = Path(folder, "model.safetensors")
    expected = Encoder(folder, devices="cpu").encode([SENTENCE])
    tensors = load_file(path)
    tensors["encoder.layer.0.attention.self.distance_embedding.weight"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    np.testing.assert_array_equal(Encoder(folder, devices="cpu").encode([SENTENCE]), expected)
