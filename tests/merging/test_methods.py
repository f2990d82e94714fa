"""Mixtures against the definition, tensor by tensor, and their folders: what opens them gets what was mixed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import SENTENCE, changed, make_classifier, make_t5, make_tiny

from raybge.merging import methods as cocktail
from raybge.merging.methods import Cocktail, linear, slerp, ties
from raybge.model.encoder import Encoder
from raybge.model.folder import FolderSettings, read_settings, write_settings
from raybge.util.errors import UserError

MIXED = ["bert", "nomic_bert", "modernbert", "qwen3", "gpt2"]  # nomic_bert's names in a file are not those in memory


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def add(folder: str | Path, **tensors: torch.Tensor) -> None:
    """Further tensors for a model, or others in place of its own."""
    save_file({**tensors_of(folder), **tensors}, Path(folder) / "model.safetensors", {"format": "pt"})


@pytest.fixture
def three(tmp_path):
    """three("bert"): folders of three models of one architecture."""

    def make(kind: str = "bert", **more) -> list[str]:
        return [changed(make_tiny(tmp_path / f"{kind}-{i}", kind, **more), i) for i in range(3)]

    return make


def mix(folder: Path, names, weights, model_type="encoder", method="linear", density=0.2, base=None) -> str:
    folder.mkdir()
    Cocktail(names, model_type, base).write(folder, weights, method, density, lambda: None)
    return str(folder)


def arithmetic(names, weights) -> dict[str, np.ndarray]:
    """The weighted sum in float64."""
    models = [tensors_of(name) for name in names]
    return {
        key: sum(w * model[key].double().numpy() for w, model in zip(weights, models, strict=True)) for key in models[0]
    }


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.5, 0.3), (1.5, -0.5)])
def test_a_mixture_is_the_weighted_sum(three, tmp_path, monkeypatch, kind, weights):
    monkeypatch.setattr(cocktail, "BLOCK", 100)  # smaller than some tensors and larger than others
    names = three(kind)[: len(weights)]
    found = tensors_of(mix(tmp_path / "mixed", names, weights))
    expected = arithmetic(names, weights)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=0, atol=1e-6)
    assert np.abs(expected[key] - tensors_of(names[0])[key].numpy()).max() > 0.1, "the models are alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_weights_1_and_0_give_the_first_model_bit_for_bit(three, tmp_path, dtype, method):
    first, second, _ = three()
    changed(first, 7, dtype)
    key = "encoder.layer.0.output.LayerNorm.bias"
    add(first, **{key: torch.full((16,), -0.0, dtype=dtype)})
    if method == "linear":
        add(second, **{key: torch.full((16,), torch.inf)})  # 0 * inf is no number
    found = tensors_of(mix(tmp_path / "mixed", [first, second], (1, 0), method=method))
    for name, tensor in tensors_of(first).items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_half_precision_is_summed_in_fp32_and_kept(three, tmp_path):
    names = [changed(name, i, torch.bfloat16) for i, name in enumerate(three())]
    found = tensors_of(mix(tmp_path / "mixed", names, (0.3, 0.3, 0.4)))
    for key, expected in arithmetic(names, (0.3, 0.3, 0.4)).items():
        # rounded once: at most half of the last of bf16's 8 bits
        np.testing.assert_allclose(found[key].float().numpy(), expected, rtol=2**-8 * 1.001, atol=1e-6)
        assert found[key].dtype == torch.bfloat16


def test_whole_numbers_are_copied_from_the_first(three, tmp_path):
    names = three()[:2]
    for i, name in enumerate(names):
        positions = torch.arange(32)[None] + 100 * i
        add(name, **{"embeddings.position_ids": positions, "other": torch.ones(i + 1).int()})
        add(name, **{f"only.{i}": torch.ones(1).int()})
    found = tensors_of(mix(tmp_path / "mixed", names, (0.5, 0.5)))
    assert torch.equal(found["embeddings.position_ids"], torch.arange(32)[None])
    assert found["other"].shape == (1,) and "only.0" in found and "only.1" not in found


def test_slerp_goes_along_the_arc():
    scipy = pytest.importorskip("scipy.spatial", reason="scipy comes with sentence-transformers (extra `dev`)")
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(50, dtype=torch.float64), dim=0) for _ in range(2))
    for share in (0.0, 0.2, 0.5, 1.0):
        found = torch.cat([*slerp([a.reshape(5, 10), b.reshape(5, 10)], [1 - share, share])])
        np.testing.assert_allclose(found, scipy.geometric_slerp(a, b, share), atol=1e-12)
        # tensors of another length keep the angle
        longer = torch.cat([*slerp([3 * a, 3 * b], [1 - share, share])])
        np.testing.assert_allclose(longer, 3 * found, atol=1e-12)


@pytest.mark.parametrize("other", [[2.0, -4.0], [-1.0, 2.0], [0.0, 0.0]], ids=["parallel", "opposite", "zero"])
def test_slerp_is_the_weighted_sum_where_there_is_no_arc(other):
    (found,) = slerp([torch.tensor([1.0, -2.0]), torch.tensor(other)], [0.25, 0.75])
    assert torch.allclose(found, 0.25 * torch.tensor([1.0, -2.0]) + 0.75 * torch.tensor(other))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_of_equal_weights_is_pefts(density, monkeypatch):
    peft = pytest.importorskip("peft.utils.merge_utils", reason="extra `lora`")
    monkeypatch.setattr(cocktail, "BLOCK", 7)
    torch.manual_seed(0)
    base, *tuned = torch.randn(4, 10, 6)
    found = torch.cat([*ties([*tuned, base], [1 / 3] * 3, density)])
    changes = peft.ties([each - base for each in tuned], torch.ones(3), density)
    assert torch.allclose(found, (base + changes).reshape(-1), atol=1e-6)


def test_ties_weighs_signs_and_changes():
    """By hand: 3 agree; 0.6 outweighs 0.4; a change that was trimmed has no say."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tuned = [base + torch.tensor(change) for change in ([2.0, 2.0, 2.0, 0.1], [1.0, -2.5, 1.0, -0.2])]
    (found,) = ties([*tuned, base], [0.6, 0.4], 0.75)
    assert torch.allclose(found, 1 + torch.tensor([0.6 * 2 + 0.4, 2.0, 0.6 * 2 + 0.4, 0.0]))


def test_a_mixture_by_ties(three, tmp_path):
    first, second, base = three()
    found = tensors_of(mix(tmp_path / "mixed", [first, second], (0.5, 0.5), method="ties", base=base, density=1.0))
    one, two, start = (tensors_of(name) for name in (first, second, base))
    for key, tensor in found.items():
        a, b = ((each[key] - start[key]).double() for each in (one, two))
        same = a.sign() == b.sign()
        larger = torch.where(a.abs() > b.abs(), a, b)
        np.testing.assert_allclose(tensor, start[key].double() + torch.where(same, (a + b) / 2, larger), atol=1e-5)


def test_a_block_of_what_is_mapped_is_not_written_into(three, tmp_path):
    names = three()[:2]
    opened = Cocktail(names, "encoder")
    before = [each.tensors[0].clone() for each in opened.aligned]
    for each in opened.aligned:
        for weights in ((1.0, 0.0), (0.5, 0.5)):
            assert len([*linear(each.tensors, weights)]) == 1
    assert all(torch.equal(each.tensors[0], tensor) for each, tensor in zip(opened.aligned, before, strict=True))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_base_model_with_a_head_and_old_names(tmp_path):
    """As google-bert/bert-base-uncased is: names begin with «bert.», layer norms are called gamma and beta."""
    base = changed(make_tiny(tmp_path / "base", head=True), 1)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors_of(base).items()
    }
    assert any("gamma" in name for name in old) and any(name.startswith("cls.") for name in old)
    save_file(old, tmp_path / "base/model.safetensors", {"format": "pt"})
    tuned = changed(make_tiny(tmp_path / "tuned", pooler=False), 2)
    expected = {
        name: (tensor.double() + tensors_of(tuned)[name].double()) / 2
        for name, tensor in transformers.AutoModel.from_pretrained(base).state_dict().items()
        if not name.startswith("pooler.")
    }
    for i, names in enumerate(([base, tuned], [tuned, base])):
        folder = mix(tmp_path / f"mixed-{i}", names, (0.5, 0.5))
        model, about = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not about["unexpected_keys"] and all(key.startswith("pooler.") for key in about["missing_keys"])
        assert type(model).__name__ == "BertModel" and model.config.architectures == ["BertModel"]
        for name, tensor in expected.items():
            np.testing.assert_allclose(model.state_dict()[name], tensor, atol=1e-6)


def test_tied_weights_stay_tied(tmp_path):
    """gpt2's head is its table of words; a `.bin` holds both, safetensors one."""
    names = [changed(make_tiny(tmp_path / f"{i}", "gpt2", head=True), i) for i in range(2)]
    both = tensors_of(names[1])
    assert "lm_head.weight" not in both
    torch.save({**both, "lm_head.weight": both["transformer.wte.weight"]}, tmp_path / "1/pytorch_model.bin")
    (tmp_path / "1/model.safetensors").rename(tmp_path / "kept.safetensors")
    for i, order in enumerate((names, names[::-1])):
        folder = mix(tmp_path / f"mixed-{i}", order, (0.5, 0.5), "decoder")
        assert sum("wte" in name or "lm_head" in name for name in tensors_of(folder)) == 1
        model, about = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not about["missing_keys"] and model.lm_head.weight is model.transformer.wte.weight
        expected = (tensors_of(names[0])["transformer.wte.weight"] + both["transformer.wte.weight"]) / 2
        np.testing.assert_allclose(model.lm_head.weight.detach(), expected, atol=1e-6)


def make_layerwise(folder: Path) -> str:
    """A language model that scores pairs, as BAAI/bge-reranker-v2-gemma does."""
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
def test_every_type_opens_again(tmp_path, model_type, make, auto):
    names = [changed(make(tmp_path / str(i)), i) for i in range(2)]
    folder = mix(tmp_path / "mixed", names, (0.25, 0.75), model_type)
    open_it = getattr(transformers, auto).from_pretrained
    model, about = open_it(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    one, two = (open_it(name).state_dict() for name in names)
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor, 0.25 * one[key] + 0.75 * two[key], atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words(SENTENCE)["input_ids"] == transformers.AutoTokenizer.from_pretrained(names[0])(SENTENCE)["input_ids"]


# --- what cannot be mixed ---------------------------------------------------------------------------------------------


def configured(folder: str, **more) -> str:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: make_tiny(p, num_hidden_layers=3), r"lacks the tensor encoder\.layer\.2\.\S+, which \S+other has"),
        (lambda p: make_tiny(p, num_hidden_layers=1), r"other lacks the tensor encoder\.layer\.1\.\S+, which"),
        (lambda p: make_tiny(p, intermediate_size=48), r"the tensor \S+dense\.\w+ is \(.*\) in \S+ and \(.*48.*\) in"),
        (lambda p: make_tiny(p, vocab_size=60), r"word_embeddings\.weight is \(64, 16\) in \S+ and \(60, 16\) in"),
        (lambda p: make_tiny(p, words=SENTENCE.split()), r"different vocabularies: the token '##s' is 25 and missing"),
        (lambda p: make_tiny(p, "roberta"), "different architectures: model_type is bert and roberta"),
        (lambda p: make_tiny(p, num_attention_heads=4), "num_attention_heads is 2 and 4"),
        (lambda p: configured(make_tiny(p), quantization_config={"bits": 4}), "quantised weights cannot be mixed"),
        (make_t5, "has an encoder and a decoder: --model_type encoder cannot be"),
        (lambda p: str(p), "no such folder"),
    ],
    ids=["more layers", "fewer layers", "width", "words", "tokens", "family", "heads", "quantised", "t5", "nothing"],
)
def test_models_that_do_not_match_are_refused(tmp_path, make, says):
    first = make_tiny(tmp_path / "first")
    with pytest.raises(UserError, match=says):
        Cocktail([first, make(tmp_path / "other")], "encoder")


def test_types_that_cannot_be_are_refused(tmp_path):
    plain = make_tiny(tmp_path / "plain")
    with pytest.raises(UserError, match="does not score pairs"):
        Cocktail([plain, plain], "reranker")
    with pytest.raises(UserError, match="has not both an encoder and a decoder"):
        Cocktail([plain, plain], "encoder-decoder")


def test_adapters_are_refused_with_what_to_do(tmp_path):
    pytest.importorskip("peft", reason="extra `lora`")
    from raybge.model.lora import Lora

    plain = make_tiny(tmp_path / "plain")
    Encoder(plain, lora=Lora(rank=2), devices="cpu").save(tmp_path / "adapters")
    with pytest.raises(UserError, match=r'holds adapters.*raybge\.Encoder\(".*adapters"\)\.save\(FOLDER\)'):
        Cocktail([plain, str(tmp_path / "adapters")], "encoder")
    Encoder(str(tmp_path / "adapters"), devices="cpu").save(tmp_path / "whole")  # as the message says
    mix(tmp_path / "mixed", [plain, str(tmp_path / "whole")], (0.5, 0.5))


# --- the folder -------------------------------------------------------------------------------------------------------


def saved(folder: Path, seed: int, pooling="mean", normalize=True, prompts=None, length=16) -> str:
    """An embedding model's folder that says how it is used."""
    changed(make_tiny(folder, pooler=False), seed)
    write_settings(folder, FolderSettings(pooling, normalize, prompts or {}, max_length=length), 16, {})
    return str(folder)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_pooling_normalising_prompts_and_length_are_kept(tmp_path, pooling, normalize):
    tuned = saved(tmp_path / "tuned", 1, pooling, normalize, {"query": "what is ", "document": ""}, 24)
    base = saved(tmp_path / "base", 2, pooling, normalize, {"query": ""}, 16)
    silent = changed(make_tiny(tmp_path / "silent", pooler=False), 3)  # says nothing: has no voice
    for i, names in enumerate(([tuned, base], [base, tuned], [silent, tuned, base])):
        weights = [1 / len(names)] * len(names)
        settings = read_settings(mix(tmp_path / f"mixed-{i}", names, weights))
        assert (settings.pooling, settings.normalize, settings.source) == (pooling, normalize, "modules.json")
        assert settings.prompts["query"] == "what is " and settings.max_length == 24


def test_sentence_transformers_and_raybge_open_it_alike(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="extra `dev`")
    names = [saved(tmp_path / str(i), i, prompts={"query": "what is ", "document": ""}) for i in range(2)]
    folder = mix(tmp_path / "mixed", names, (0.5, 0.5))
    texts = ["a lane row", SENTENCE]
    ours = Encoder(folder, devices="cpu")
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    np.testing.assert_allclose(ours.encode_queries(texts), theirs.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(ours.encode_corpus(texts), theirs.encode_document(texts), atol=1e-5)
    assert not np.allclose(ours.encode_corpus(texts), Encoder(names[0], devices="cpu").encode_corpus(texts), atol=1e-2)


@pytest.mark.parametrize(
    ("more", "says"),
    [({"pooling": "cls"}, "pooling is mean and cls"), ({"normalize": False}, "normalize is True and False")],
)
def test_folders_that_make_vectors_in_different_ways_are_refused(tmp_path, more, says):
    with pytest.raises(UserError, match=f"make vectors in different ways: {says}"):
        Cocktail([saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, **more)], "encoder")


def test_old_folders_have_their_weights_further_down(tmp_path):
    names = [saved(tmp_path / str(i), i) for i in range(2)]
    inside = Path(names[0]) / "0_Transformer"
    inside.mkdir()
    for path in [*Path(names[0]).glob("*.safetensors"), Path(names[0]) / "config.json"]:
        path.rename(inside / path.name)
    for path in Path(names[0]).glob("token*"):
        path.rename(inside / path.name)
    modules = Path(names[0]) / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "0_Transformer"', 1))
    folder = mix(tmp_path / "mixed", names, (0.5, 0.5))
    assert read_settings(folder).subfolder == "" and Encoder(folder, devices="cpu").encode("lane").shape == (16,)


def test_a_models_code_and_generation_settings_come_along(tmp_path):
    names = [changed(make_tiny(tmp_path / str(i), "qwen3", head=True), i) for i in range(2)]
    (tmp_path / "0/modeling_own.py").write_text("# code\n")
    (tmp_path / "0/generation_config.json").write_text('{"temperature": 0.6}')
    folder = Path(mix(tmp_path / "mixed", names, (0.5, 0.5), "decoder"))
    assert (folder / "modeling_own.py").read_text() == "# code\n"
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_a_name_on_the_hub_is_found_in_the_cache(tmp_path):
    """Without a network, as the tests run."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache/models--owner--tiny"
    changed(make_tiny(place / "snapshots" / commit, pooler=False), 1)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    local = changed(make_tiny(tmp_path / "local", pooler=False), 2)
    opened = Cocktail(["owner/tiny", local], "encoder", cache_dir=str(tmp_path / "cache"))
    assert opened.models[0].folder == place / "snapshots" / commit
    with pytest.raises(UserError, match="--model_names_or_paths owner/none: it is no folder, and cannot be fetched"):
        Cocktail([local, "owner/none"], "encoder", cache_dir=str(tmp_path / "cache"))


# --- the recipe's own package -----------------------------------------------------------------------------------------


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
def test_equal_to_the_recipes_package(lm_cocktail, tmp_path, model_type, make, auto):
    names = [changed(make(tmp_path / str(i)), i) for i in range(3)]
    theirs = lm_cocktail.mix_models(names, model_type, [0.2, 0.5, 0.3]).state_dict()
    folder = mix(tmp_path / "mixed", names, (0.2, 0.5, 0.3), model_type)
    ours = getattr(transformers, auto).from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[key], atol=1e-6)
