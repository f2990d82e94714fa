"""Merged models compared tensor by tensor with the definition, and loaded from their folders by each library."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import SENTENCE, make_classifier, make_t5, make_tiny, perturb_weights

from raybge.merging import methods
from raybge.merging.alignment import AlignedModels
from raybge.merging.methods import linear
from raybge.model.encoder import Encoder
from raybge.model.folder import FolderSettings, read_settings, write_settings
from raybge.util.errors import UserError

KINDS = [
    "bert",
    "nomic_bert",
    "modernbert",
    "qwen3",
    "gpt2",
]  # nomic_bert has other tensor names in files than in memory


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def add(folder: str | Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a model's file, or replace its own."""
    save_file({**tensors_of(folder), **tensors}, Path(folder) / "model.safetensors", {"format": "pt"})


@pytest.fixture
def three(tmp_path):
    """Return a function from an architecture to the folders of three models."""

    def make(kind: str = "bert", **more) -> list[str]:
        return [perturb_weights(make_tiny(tmp_path / f"{kind}-{i}", kind, **more), i) for i in range(3)]

    return make


def merge(folder: Path, names, weights, model_type="encoder", method="linear", density=0.2, base=None) -> str:
    folder.mkdir()
    AlignedModels(names, model_type, base).write(folder, weights, method, density, lambda: None)
    return str(folder)


def weighted_sum(names, weights) -> dict[str, np.ndarray]:
    """The weighted sum in float64."""
    models = [tensors_of(name) for name in names]
    return {
        key: sum(w * model[key].double().numpy() for w, model in zip(weights, models, strict=True)) for key in models[0]
    }


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.5, 0.3), (1.5, -0.5)])
def test_linear_merge_is_the_weighted_sum(three, tmp_path, monkeypatch, kind, weights):
    monkeypatch.setattr(methods, "BLOCK", 100)  # smaller than some tensors and larger than others
    names = three(kind)[: len(weights)]
    merged = tensors_of(merge(tmp_path / "merged", names, weights))
    expected = weighted_sum(names, weights)
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=0, atol=1e-6)
    assert np.abs(expected[key] - tensors_of(names[0])[key].numpy()).max() > 0.1, "the models are alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_weights_1_and_0_reproduce_the_first_model_bit_for_bit(three, tmp_path, dtype, method):
    first, second, _ = three()
    perturb_weights(first, 7, dtype)
    key = "encoder.layer.0.output.LayerNorm.bias"
    add(first, **{key: torch.full((16,), -0.0, dtype=dtype)})
    merged = tensors_of(merge(tmp_path / "merged", [first, second], (1, 0), method=method))
    for name, tensor in tensors_of(first).items():
        assert torch.equal(merged[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_half_precision_is_summed_in_fp32_and_written_in_half(three, tmp_path):
    names = [perturb_weights(name, i, torch.bfloat16) for i, name in enumerate(three())]
    merged = tensors_of(merge(tmp_path / "merged", names, (0.3, 0.3, 0.4)))
    for key, expected in weighted_sum(names, (0.3, 0.3, 0.4)).items():
        # rounded once: the error is at most half of the last of bf16's 8 bits
        np.testing.assert_allclose(merged[key].float().numpy(), expected, rtol=2**-8 * 1.001, atol=1e-6)
        assert merged[key].dtype == torch.bfloat16


def test_integer_buffers_are_copied_from_the_first_model(three, tmp_path):
    names = three()[:2]
    for i, name in enumerate(names):
        positions = torch.arange(32)[None] + 100 * i
        add(name, **{"embeddings.position_ids": positions, "other": torch.ones(i + 1).int()})
        add(name, **{f"only.{i}": torch.ones(1).int()})
    merged = tensors_of(merge(tmp_path / "merged", names, (0.5, 0.5)))
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(32)[None])
    assert merged["other"].shape == (1,) and "only.0" in merged and "only.1" not in merged


def test_ties_merges_changes_of_the_base_model(three, tmp_path):
    first, second, base = three()
    merged = tensors_of(merge(tmp_path / "merged", [first, second], (0.5, 0.5), method="ties", base=base, density=1.0))
    one, two, start = (tensors_of(name) for name in (first, second, base))
    for key, tensor in merged.items():
        a, b = ((each[key] - start[key]).double() for each in (one, two))
        same = a.sign() == b.sign()
        larger = torch.where(a.abs() > b.abs(), a, b)
        np.testing.assert_allclose(tensor, start[key].double() + torch.where(same, (a + b) / 2, larger), atol=1e-5)


def test_memory_mapped_tensors_are_not_written_into(three, tmp_path):
    names = three()[:2]
    opened = AlignedModels(names, "encoder")
    before = [each.tensors[0].clone() for each in opened.tensors]
    for each in opened.tensors:
        for weights in ((1.0, 0.0), (0.5, 0.5)):
            assert len([*linear(each.tensors, weights)]) == 1
    assert all(torch.equal(each.tensors[0], tensor) for each, tensor in zip(opened.tensors, before, strict=True))


# --- names ------------------------------------------------------------------------------------------------------------


def test_base_model_with_head_and_old_tensor_names(tmp_path):
    """google-bert/bert-base-uncased has the prefix `bert.` and calls its layer norm parameters gamma and beta."""
    base = perturb_weights(make_tiny(tmp_path / "base", head=True), 1)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors_of(base).items()
    }
    assert any("gamma" in name for name in old) and any(name.startswith("cls.") for name in old)
    save_file(old, tmp_path / "base/model.safetensors", {"format": "pt"})
    tuned = perturb_weights(make_tiny(tmp_path / "tuned", pooler=False), 2)
    expected = {
        name: (tensor.double() + tensors_of(tuned)[name].double()) / 2
        for name, tensor in transformers.AutoModel.from_pretrained(base).state_dict().items()
        if not name.startswith("pooler.")
    }
    for i, names in enumerate(([base, tuned], [tuned, base])):
        folder = merge(tmp_path / f"merged-{i}", names, (0.5, 0.5))
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"] and all(key.startswith("pooler.") for key in info["missing_keys"])
        assert type(model).__name__ == "BertModel" and model.config.architectures == ["BertModel"]
        for name, tensor in expected.items():
            np.testing.assert_allclose(model.state_dict()[name], tensor, atol=1e-6)


def test_tied_weights_stay_tied(tmp_path):
    """gpt2 ties its head to the token embeddings; a `.bin` file contains both tensors, safetensors one."""
    names = [perturb_weights(make_tiny(tmp_path / f"{i}", "gpt2", head=True), i) for i in range(2)]
    both = tensors_of(names[1])
    assert "lm_head.weight" not in both
    torch.save({**both, "lm_head.weight": both["transformer.wte.weight"]}, tmp_path / "1/pytorch_model.bin")
    (tmp_path / "1/model.safetensors").rename(tmp_path / "kept.safetensors")
    for i, order in enumerate((names, names[::-1])):
        folder = merge(tmp_path / f"merged-{i}", order, (0.5, 0.5), "decoder")
        assert sum("wte" in name or "lm_head" in name for name in tensors_of(folder)) == 1
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and model.lm_head.weight is model.transformer.wte.weight
        expected = (tensors_of(names[0])["transformer.wte.weight"] + both["transformer.wte.weight"]) / 2
        np.testing.assert_allclose(model.lm_head.weight.detach(), expected, atol=1e-6)


def make_layerwise(folder: Path) -> str:
    """Make a language model that scores pairs, like BAAI/bge-reranker-v2-gemma."""
    return make_tiny(folder, "qwen3", head=True)


@pytest.mark.parametrize(
    ("model_type", "make", "auto"),
    [
        ("reranker", make_classifier, "AutoModelForSequenceClassification"),
        ("reranker", make_layerwise, "AutoModelForCausalLM"),
        ("decoder", make_layerwise, "AutoModelForCausalLM"),
        ("encoder-decoder", make_t5, "AutoModelForSeq2SeqLM"),
    ],
    ids=["classifier", "language model as reranker", "decoder", "encoder-decoder"],
)
def test_every_model_type_loads_again(tmp_path, model_type, make, auto):
    names = [perturb_weights(make(tmp_path / str(i)), i) for i in range(2)]
    folder = merge(tmp_path / "merged", names, (0.25, 0.75), model_type)
    open_it = getattr(transformers, auto).from_pretrained
    model, info = open_it(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    one, two = (open_it(name).state_dict() for name in names)
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor, 0.25 * one[key] + 0.75 * two[key], atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words(SENTENCE)["input_ids"] == transformers.AutoTokenizer.from_pretrained(names[0])(SENTENCE)["input_ids"]


# --- incompatible models ----------------------------------------------------------------------------------------------


def configured(folder: str, **more) -> str:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: make_tiny(p, num_hidden_layers=3), r"lacks the tensor encoder\.layer\.2\.\S+ of \S+other"),
        (lambda p: make_tiny(p, num_hidden_layers=1), r"other lacks the tensor encoder\.layer\.1\.\S+ of"),
        (
            lambda p: make_tiny(p, intermediate_size=48),
            r"the tensor \S+dense\.\w+ has shape \(.*\) in \S+ and \(.*48.*\) in",
        ),
        (
            lambda p: make_tiny(p, vocab_size=60),
            r"word_embeddings\.weight has shape \(64, 16\) in \S+ and \(60, 16\) in",
        ),
        (
            lambda p: make_tiny(p, words=SENTENCE.split()),
            r"different vocabularies: the id of token '##s' is 25 and missing",
        ),
        (lambda p: make_tiny(p, "roberta"), "different architectures: model_type is bert and roberta"),
        (lambda p: make_tiny(p, num_attention_heads=4), "num_attention_heads is 2 and 4"),
        (lambda p: configured(make_tiny(p), quantization_config={"bits": 4}), "quantized weights cannot be merged"),
        (make_t5, "is an encoder-decoder model, which contradicts --model_type encoder"),
        (lambda p: str(p), "no such folder"),
    ],
    ids=[
        "more layers",
        "fewer layers",
        "width",
        "vocabulary size",
        "vocabulary",
        "family",
        "heads",
        "quantized",
        "t5",
        "missing folder",
    ],
)
def test_incompatible_models_are_rejected(tmp_path, make, message):
    first = make_tiny(tmp_path / "first")
    with pytest.raises(UserError, match=message):
        AlignedModels([first, make(tmp_path / "other")], "encoder")


def test_wrong_model_types_are_rejected(tmp_path):
    plain = make_tiny(tmp_path / "plain")
    with pytest.raises(UserError, match="is not a reranker: its architecture is BertModel"):
        AlignedModels([plain, plain], "reranker")
    with pytest.raises(UserError, match="is not an encoder-decoder model"):
        AlignedModels([plain, plain], "encoder-decoder")


def test_adapters_are_rejected_with_a_remedy(tmp_path):
    from raybge.model.lora import Lora

    plain = make_tiny(tmp_path / "plain")
    Encoder(plain, lora=Lora(rank=2), devices="cpu").save(tmp_path / "adapters")
    with pytest.raises(UserError, match=r'contains adapters.*raybge\.Encoder\(".*adapters"\)\.save\(FOLDER\)'):
        AlignedModels([plain, str(tmp_path / "adapters")], "encoder")
    Encoder(str(tmp_path / "adapters"), devices="cpu").save(tmp_path / "whole")  # as the message says
    merge(tmp_path / "merged", [plain, str(tmp_path / "whole")], (0.5, 0.5))


# --- the merged model's folder ----------------------------------------------------------------------------------------


def saved(folder: Path, seed: int, pooling="mean", normalize=True, prompts=None, length=16) -> str:
    """Write an embedding model's folder with its settings."""
    perturb_weights(make_tiny(folder, pooler=False), seed)
    write_settings(folder, FolderSettings(pooling, normalize, prompts or {}, max_length=length), 16, {})
    return str(folder)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_pooling_normalization_prompts_and_length_are_preserved(tmp_path, pooling, normalize):
    tuned = saved(tmp_path / "tuned", 1, pooling, normalize, {"query": "what is ", "document": ""}, 24)
    base = saved(tmp_path / "base", 2, pooling, normalize, {"query": ""}, 16)
    unstated = perturb_weights(make_tiny(tmp_path / "unstated", pooler=False), 3)  # without settings: ignored
    for i, names in enumerate(([tuned, base], [base, tuned], [unstated, tuned, base])):
        weights = [1 / len(names)] * len(names)
        settings = read_settings(merge(tmp_path / f"merged-{i}", names, weights))
        assert (settings.pooling, settings.normalize, settings.source) == (pooling, normalize, "modules.json")
        assert settings.prompts["query"] == "what is " and settings.max_length == 24


def test_sentence_transformers_computes_equal_embeddings(tmp_path):
    import sentence_transformers

    names = [saved(tmp_path / str(i), i, prompts={"query": "what is ", "document": ""}) for i in range(2)]
    folder = merge(tmp_path / "merged", names, (0.5, 0.5))
    texts = ["a lane row", SENTENCE]
    ours = Encoder(folder, devices="cpu")
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    np.testing.assert_allclose(ours.encode_queries(texts), theirs.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(ours.encode_corpus(texts), theirs.encode_document(texts), atol=1e-5)
    assert not np.allclose(ours.encode_corpus(texts), Encoder(names[0], devices="cpu").encode_corpus(texts), atol=1e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"pooling": "cls"}, "pooling is mean and cls"), ({"normalize": False}, "normalize is True and False")],
)
def test_folders_with_different_settings_are_rejected(tmp_path, more, message):
    with pytest.raises(UserError, match=f"compute embeddings differently: {message}"):
        AlignedModels([saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, **more)], "encoder")


def test_old_folders_with_weights_in_a_subfolder(tmp_path):
    names = [saved(tmp_path / str(i), i) for i in range(2)]
    inside = Path(names[0]) / "0_Transformer"
    inside.mkdir()
    for path in [*Path(names[0]).glob("*.safetensors"), Path(names[0]) / "config.json"]:
        path.rename(inside / path.name)
    for path in Path(names[0]).glob("token*"):
        path.rename(inside / path.name)
    modules = Path(names[0]) / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "0_Transformer"', 1))
    folder = merge(tmp_path / "merged", names, (0.5, 0.5))
    assert read_settings(folder).subfolder == "" and Encoder(folder, devices="cpu").encode("lane").shape == (16,)


def test_code_and_generation_settings_are_copied(tmp_path):
    names = [perturb_weights(make_tiny(tmp_path / str(i), "qwen3", head=True), i) for i in range(2)]
    (tmp_path / "0/modeling_own.py").write_text("# code\n")
    (tmp_path / "0/generation_config.json").write_text('{"temperature": 0.6}')
    folder = Path(merge(tmp_path / "merged", names, (0.5, 0.5), "decoder"))
    assert (folder / "modeling_own.py").read_text() == "# code\n"
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_hub_name_is_read_from_the_cache(tmp_path):
    """Without a network, as the tests run."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache/models--owner--tiny"
    perturb_weights(make_tiny(place / "snapshots" / commit, pooler=False), 1)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    local = perturb_weights(make_tiny(tmp_path / "local", pooler=False), 2)
    opened = AlignedModels(["owner/tiny", local], "encoder", cache_dir=str(tmp_path / "cache"))
    assert opened.models[0].folder == place / "snapshots" / commit
    with pytest.raises(UserError, match="--model_names_or_paths owner/none is not a folder and cannot be downloaded"):
        AlignedModels([local, "owner/none"], "encoder", cache_dir=str(tmp_path / "cache"))


# --- LM-Cocktail ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lm_cocktail():
    try:
        import LM_Cocktail
    except ImportError as error:
        pytest.skip(f"lm-cocktail 0.0.4 cannot be imported ({error}): pip install --no-deps --target DIR lm-cocktail")
    return LM_Cocktail


@pytest.mark.parametrize(
    ("model_type", "make", "auto"),
    [
        ("encoder", make_tiny, "AutoModel"),
        ("reranker", make_classifier, "AutoModelForSequenceClassification"),
        ("decoder", make_layerwise, "AutoModelForCausalLM"),
    ],
)
def test_equals_lm_cocktail(lm_cocktail, tmp_path, model_type, make, auto):
    names = [perturb_weights(make(tmp_path / str(i)), i) for i in range(3)]
    theirs = lm_cocktail.mix_models(names, model_type, [0.2, 0.5, 0.3]).state_dict()
    folder = merge(tmp_path / "merged", names, (0.2, 0.5, 0.3), model_type)
    ours = getattr(transformers, auto).from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[key], atol=1e-6)
