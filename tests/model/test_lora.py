"""Low-rank adapters: trained parameters, saved folders, and loading in other libraries."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.encoder import Encoder
from raybge.model.folder import read_settings
from raybge.model.folder_checks import check_model_folder
from raybge.model.lora import Lora
from raybge.util.errors import UserError

TEXTS = ["lane", "the text that we read and sort by length in chunks on one node", "rows of one node", "block"]
KINDS = ["bert", "qwen3", "gpt2"]  # gpt2 keeps its weights transposed
LORA = Lora(rank=4, alpha=6, dropout=0.0)
WHOLE = ["config.json", "model.safetensors"]
ADAPTERS = ["adapter_config.json", "adapter_model.safetensors"]


def train_a_step(encoder: Encoder) -> list[str]:
    """Train two steps, since half of a new adapter is zero; return the parameters that never had a gradient."""
    model = encoder.model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    still = set(trained)
    for _ in range(2):
        optimizer.zero_grad()
        e_ND = model.embed(encoder.tokenize(TEXTS, 32), 100)
        (e_ND @ e_ND.T).tril(-1).pow(2).sum().backward()
        still -= {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    model.eval()
    return sorted(still)


@pytest.fixture
def trained(tiny):
    """trained("bert"): an encoder with trained adapters, and the folder of its base model."""

    def make(kind: str = "bert", lora: Lora = LORA) -> tuple[Encoder, str]:
        torch.manual_seed(2)
        folder = tiny(kind)
        encoder = Encoder(folder, lora=lora, devices="cpu")
        assert train_a_step(encoder) == []
        return encoder, folder

    return make


def files(folder: Path) -> list[str]:
    return sorted(name for name in [*WHOLE, *ADAPTERS] if (folder / name).is_file())


def assert_close(result, expected):
    assert np.std(np.asarray(expected), axis=0).max() > 0.05
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained(tiny, kind):
    folder = tiny(kind)
    encoder = Encoder(folder, lora=LORA, devices="cpu")
    before = {name: p.clone() for name, p in encoder.model.named_parameters()}
    assert_close(encoder.encode(TEXTS), Encoder(folder, devices="cpu").encode(TEXTS))  # a new one adds nothing
    assert train_a_step(encoder) == []  # a pooler's would be here, and data-parallel training would wait for it
    changed = {name for name, p in encoder.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert np.abs(encoder.encode(TEXTS) - Encoder(folder, devices="cpu").encode(TEXTS)).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_in_other_libraries(trained, tmp_path, kind):
    encoder, folder = trained(kind)
    expected = encoder.encode(TEXTS)
    saved = tmp_path / "saved"
    encoder.save(saved)
    assert files(saved) == ADAPTERS
    adapter_config = json.loads((saved / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == folder
    check_model_folder(str(saved), "--model_name_or_path")
    assert read_settings(str(saved)).base == folder
    assert_close(Encoder(str(saved), devices="cpu").encode(TEXTS), expected)
    import sentence_transformers as st

    assert_close(st.SentenceTransformer(str(saved), device="cpu").encode(TEXTS), expected)
    plain = transformers.AutoModel.from_pretrained(saved).eval()
    with torch.no_grad():
        for text, e_D in zip(encoder.tokenize(TEXTS, 32), expected, strict=True):
            h_TD = plain(input_ids=torch.tensor([text])).last_hidden_state[0]
            h_D = h_TD[0] if kind == "bert" else h_TD[-1]
            np.testing.assert_allclose(h_D / h_D.norm(), e_D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_a_plain_model(trained, tmp_path, kind):
    encoder, folder = trained(kind)
    encoder.save(tmp_path / "saved", merge_adapters=True)
    assert files(tmp_path / "saved") == WHOLE
    ours, theirs = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "saved", folder))
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
    assert_close(Encoder(str(tmp_path / "saved"), devices="cpu").encode(TEXTS), encoder.encode(TEXTS))
    import sentence_transformers as st

    assert_close(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), encoder.encode(TEXTS))


def test_merging_equals_the_definition(trained, tmp_path):
    """W + alpha / rank * B A in one layer; layers without adapters equal the base."""
    encoder, folder = trained(lora=Lora(4, 6, 0.0, ("query",)))
    encoder.save(tmp_path / "adapters")
    encoder.save(tmp_path / "whole", merge_adapters=True)
    adapters = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    base, whole = load_file(f"{folder}/model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    for name, weight in base.items():
        if name.endswith("query.weight"):
            a, b = (adapters[f"base_model.model.{name.replace('weight', f'lora_{side}.weight')}"] for side in "AB")
            assert (b @ a).abs().max() > 0.01
            weight = weight + 6 / 4 * b @ a
        torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("merge", [True, False])
def test_passed_state_dict_is_written(tiny, tmp_path, lora, merge):
    """Weights in memory may be shards; names are those of compiled and wrapped models."""
    encoder = Encoder(tiny(), lora=lora, devices="cpu")
    wrapped = ContrastiveModel(encoder.model, Objective(0.1), None)
    assert train_a_step(encoder) == []
    expected = encoder.encode(TEXTS)
    whole = {name: w.clone() for name, w in wrapped.state_dict().items()}
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.zero_()
    names = {name: name.replace("backbone.", "backbone._orig_mod.") for name in whole}
    encoder.save(tmp_path / "a", {f"module.{names[name]}": w for name, w in whole.items()}, merge_adapters=merge)
    assert files(tmp_path / "a") == (ADAPTERS if lora and not merge else WHOLE)
    assert_close(Encoder(str(tmp_path / "a"), devices="cpu").encode(TEXTS), expected)
    whole.popitem()
    with pytest.raises(ValueError, match=r"state_dict does not match this model.*\(1 in total\)"):
        encoder.save(tmp_path / "a", whole)
    assert_close(Encoder(str(tmp_path / "a"), devices="cpu").encode(TEXTS), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [LORA, None])
def test_weights_are_loaded_in_place(tiny, tmp_path, kind, lora):
    encoder = Encoder(tiny(kind, pooler=kind != "bert"), lora=lora, devices="cpu")
    train_a_step(encoder)
    expected = encoder.encode(TEXTS)
    encoder.save(tmp_path / "saved")
    parameters = list(encoder.model.parameters())
    for _ in range(3):
        train_a_step(encoder)
    assert np.abs(encoder.encode(TEXTS) - expected).max() > 0.01
    encoder.load_weights(tmp_path / "saved")
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    # an optimizer, or a wrapper of data-parallel training, still holds these
    assert all(a is b for a, b in zip(parameters, encoder.model.parameters(), strict=True))


def test_weights_of_other_models_are_errors(trained, tiny, tmp_path):
    encoder, _ = trained()
    encoder.save(tmp_path / "adapters")
    encoder.save(tmp_path / "whole", merge_adapters=True)
    plain = Encoder(tiny("bert", "plain"), devices="cpu")
    with pytest.raises(UserError, match="the checkpoint .*whole holds a full model"):
        encoder.load_weights(tmp_path / "whole")
    with pytest.raises(UserError, match="the checkpoint .*adapters holds adapters"):
        plain.load_weights(tmp_path / "adapters")
    with pytest.raises(UserError, match="does not match this model"):
        plain.load_weights(tiny("bert", "three", num_hidden_layers=3))
    with pytest.raises(UserError, match="they differ in .*lora_A"):
        Encoder(tiny("bert", "other"), lora=Lora(2, 6, 0.0), devices="cpu").load_weights(tmp_path / "adapters")


def test_adapters_are_trained_further(trained, tmp_path):
    encoder, folder = trained()
    encoder.save(tmp_path / "first")
    again = Encoder(str(tmp_path / "first"), lora=LORA, devices="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert train_a_step(again) == []
    again.save(tmp_path / "second")
    assert read_settings(str(tmp_path / "second")).base == folder
    assert_close(Encoder(str(tmp_path / "second"), devices="cpu").encode(TEXTS), again.encode(TEXTS))
    # without --use_lora: the whole model that they make, trained and saved whole
    whole = Encoder(str(tmp_path / "first"), devices="cpu")
    frozen = {name for name, p in whole.model.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}
    whole.save(tmp_path / "third")
    assert files(tmp_path / "third") == WHOLE
    for lora, message in ((Lora(8, 6, 0.0), "--lora_rank 8"), (Lora(4, 7, 0.0), "--lora_alpha 7")):
        with pytest.raises(UserError, match=f"{message}: the adapters of .*first"):
            Encoder(str(tmp_path / "first"), lora=lora, devices="cpu")
    with pytest.raises(UserError, match="they differ in"):
        Encoder(str(tmp_path / "first"), lora=Lora(4, 6, 0.0, ("query",)), devices="cpu")
    config = tmp_path / "first" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True}))
    with pytest.raises(UserError, match="have use_rslora"):
        Encoder(str(tmp_path / "first"), lora=LORA, devices="cpu")


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("query", "value"), ["self.query", "self.value"]),
        (("attention.output.dense",), ["output.dense"]),
        (None, ["intermediate.dense", "output.dense", "output.dense", "self.key", "self.query", "self.value"]),
    ],
)
def test_targets(tiny, targets, expected):
    backbone = Encoder(tiny(), lora=Lora(2, 2, 0.0, targets), devices="cpu").model.backbone
    layers = [name for name, module in backbone.named_modules() if hasattr(module, "lora_A")]
    assert sorted(".".join(name.rsplit(".", 2)[-2:]) for name in layers) == sorted(expected * 2)  # of two layers


@pytest.mark.parametrize("targets", [("query", "quary"), ("word_embeddings",), ("uery",), ()])
def test_unknown_target_is_an_error(tiny, targets):
    with pytest.raises(UserError, match=r"--target_modules .*no such linear layer.* expected one of dense, key, query"):
        Encoder(tiny(), lora=Lora(target_modules=targets), devices="cpu")


@pytest.mark.parametrize(
    "flags, message",
    [({"rank": 0}, "--lora_rank"), ({"alpha": 0}, "--lora_alpha"), ({"dropout": 1.0}, "--lora_dropout")],
)
def test_values_out_of_range_are_errors(flags, message):
    with pytest.raises(UserError, match=f"{message} must be"):
        Lora(**flags)


def test_missing_peft_is_an_error_with_the_extra(trained, tmp_path, monkeypatch):
    encoder, _ = trained()
    encoder.save(tmp_path / "adapters")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    for attempt in (
        lambda: Lora(),
        lambda: check_model_folder(str(tmp_path / "adapters"), "--encoder"),
        lambda: Encoder(str(tmp_path / "adapters"), devices="cpu"),
    ):
        with pytest.raises(UserError, match=r"requires the package peft: pip install 'raybge\[lora\]'"):
            attempt()


def test_incomplete_adapter_folders_are_errors(trained, tmp_path):
    encoder, folder = trained()
    saved = tmp_path / "saved"
    encoder.save(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    for base, message in (
        (f"{folder}-gone", "does not exist on this machine"),
        (None, "base_model_name_or_path is missing"),
    ):
        (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            Encoder(str(saved), devices="cpu")
    (saved / "adapter_config.json").write_text(json.dumps(config))
    (saved / "model.safetensors").touch()
    with pytest.raises(UserError, match="both a model's weights and adapters"):
        Encoder(str(saved), devices="cpu")
    (saved / "model.safetensors").unlink()
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights here, expected one of adapter_model.safetensors"):
        Encoder(str(saved), devices="cpu")


def test_saving_replaces_weights_by_adapters_and_back(trained, tmp_path):
    encoder, _ = trained()
    for merge in (False, True, False):
        encoder.save(tmp_path / "saved", merge_adapters=merge)
        assert files(tmp_path / "saved") == (WHOLE if merge else ADAPTERS)


def test_saving_adapters_is_deterministic(trained, tmp_path):
    encoder, _ = trained()
    for name in ("a", "b"):
        encoder.save(tmp_path / name)
    for name in ADAPTERS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # a set's order would change from process to process


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradient(tiny, reentrant):
    """With all weights frozen, recomputed layers have no input that requires a gradient unless it is enabled."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        encoder = Encoder(tiny(dropout=0.0), lora=LORA, devices="cpu")
        model = ContrastiveModel(encoder.model, Objective(0.1), None)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        encoder.model.train()
        encoder.model.embed(encoder.tokenize(TEXTS, 32), 100).square().mul(torch.arange(16)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
