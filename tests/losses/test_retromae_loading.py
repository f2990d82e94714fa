"""Models of pre-training: loading, encoder folders for other libraries, and checkpoints."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import ENCODERS, WORDS, make_tiny, write_placeholders

from raybge.data.jsonl import Row
from raybge.data.masking import TextMasker, unpack_masked
from raybge.losses.retromae_loading import (
    PRETRAINING_FILE,
    load_pretraining_checkpoint,
    load_pretraining_model,
    save_encoder,
    save_pretraining_checkpoint,
)
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

TEXTS = ["lanes of rows", "what is a lane row block of the text that we read"]


def batch_of(tokenizer):
    rows = [Row(0, i, i, {}, text) for i, text in enumerate(TEXTS)]
    return unpack_masked(TextMasker(tokenizer, 32, seed=1)(0, 0, rows))


def loss_of(loaded):
    with torch.no_grad():
        return loaded.model.eval()(batch_of(loaded.tokenizer)).item()


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("kind", ENCODERS)
def test_language_model_keeps_its_head(tmp_path, kind):
    folder = make_tiny(tmp_path / "lm", kind, head=True, mask=True)
    lm = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    model, tokenizer, fresh = load_pretraining_model(folder)
    assert not fresh
    ids_BT = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        h_TD = model.eval().embedding.backbone(input_ids=ids_BT).last_hidden_state[0]
        torch.testing.assert_close(model._logits(h_TD), lm(input_ids=ids_BT).logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_embedding_model_gets_a_new_head_tied_to_its_embeddings(tmp_path, kind):
    folder = make_tiny(tmp_path / "embedding", kind, mask=True, tie_word_embeddings=False)
    model, _, fresh = load_pretraining_model(folder)
    assert fresh
    words = model.embedding.backbone.get_input_embeddings().weight
    assert model.head.get_output_embeddings().weight is words
    result = model.embedding.backbone.state_dict()
    for name, weight in transformers.AutoModel.from_pretrained(folder).state_dict().items():
        assert name.startswith("pooler.") or torch.equal(result[name], weight)


def test_sentence_transformers_folder_is_an_embedding_model(tmp_path):
    encoder = Encoder(make_tiny(tmp_path / "plain", mask=True), devices="cpu", passage_max_length=24)
    encoder.save(tmp_path / "finished")
    loaded = load_pretraining_model(str(tmp_path / "finished"))
    assert loaded.fresh_head
    word = loaded.model.embedding.backbone.get_input_embeddings().weight
    assert torch.equal(word, encoder.model.backbone.get_input_embeddings().weight)


def test_from_scratch(tmp_path):
    folder = make_tiny(tmp_path / "source", "distilbert", mask=True)
    torch.manual_seed(1)
    loaded = load_pretraining_model(config_name=folder, tokenizer_name=folder)
    assert loaded.fresh_head
    assert (
        loaded.model.head.get_output_embeddings().weight
        is loaded.model.embedding.backbone.get_input_embeddings().weight
    )
    assert not torch.equal(
        loaded.model.embedding.backbone.get_input_embeddings().weight,
        weights(folder)["embeddings.word_embeddings.weight"],
    )
    assert np.isfinite(loss_of(loaded))
    torch.manual_seed(1)
    assert loss_of(load_pretraining_model(config_name=folder, tokenizer_name=folder)) == loss_of(loaded)


@pytest.mark.parametrize("kind", ENCODERS)
def test_new_head_starts_with_the_word_frequencies(tmp_path, kind):
    """The head's prediction for a zero vector."""
    model, tokenizer, _ = load_pretraining_model(make_tiny(tmp_path / "embedding", kind, mask=True))
    count_V = TextMasker(tokenizer, 24, seed=0).count(TEXTS, model.vocabulary)
    expected = Counter(i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert Counter(dict(enumerate(count_V))) == expected and expected.total() > 10
    model.init_output_bias(count_V)
    with torch.no_grad():
        says_V = model.eval()._logits(torch.zeros(1, 16)).softmax(-1)[0].numpy()
    share_V = count_V / expected.total()
    np.testing.assert_allclose(says_V, 0.95 * share_V + 0.05 / model.vocabulary, rtol=1e-5)
    model.init_output_bias(np.zeros_like(count_V))
    with torch.no_grad():
        np.testing.assert_array_equal(model._logits(torch.zeros(1, 16)).softmax(-1)[0].numpy(), says_V)


def test_another_configuration_and_tokenizer_are_used(tmp_path):
    folder = make_tiny(tmp_path / "one", head=True)
    other = make_tiny(tmp_path / "two", mask=True, num_hidden_layers=1)
    model, tokenizer, _ = load_pretraining_model(folder, other, other)
    assert len(model.embedding.backbone.encoder.layer) == 1
    assert tokenizer.mask_token == "[MASK]"


@pytest.mark.parametrize("kind", ENCODERS)
def test_saved_encoder_loads_in_other_libraries_without_decoder(tmp_path, kind):
    loaded = load_pretraining_model(make_tiny(tmp_path / "lm", kind, head=True, mask=True))
    model = loaded.model.eval()
    saved = tmp_path / "saved"
    save_pretraining_checkpoint(*loaded[:2], saved, 20)  # which has a decoder
    save_encoder(*loaded[:2], saved, 20)
    assert not (saved / PRETRAINING_FILE).exists()
    assert sum(w.numel() for w in weights(saved).values()) == sum(w.numel() for w in model.embedding.parameters())
    encoder = Encoder(str(saved), devices="cpu")
    assert (encoder.model.pooling, encoder.model.normalize, encoder.passage_max_length) == ("cls", True, 20)
    assert encoder.tokenizer.mask_token == "[MASK]"
    ids = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    plain = transformers.AutoModel.from_pretrained(saved).eval()
    with torch.no_grad():
        expected, other = (
            torch.stack([m(input_ids=torch.tensor([row])).last_hidden_state[0, 0] for row in ids])
            for m in (model.embedding.backbone, plain)
        )
    assert torch.equal(expected, other)
    expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=1e-5)
    import sentence_transformers as st

    np.testing.assert_allclose(st.SentenceTransformer(str(saved), device="cpu").encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_checkpoint_holds_all_weights_and_is_an_encoder_folder(tmp_path, kind, tied):
    folder = make_tiny(tmp_path / "lm", kind, head=True, mask=True, tie_word_embeddings=tied)
    loaded = load_pretraining_model(folder)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    save_pretraining_checkpoint(*loaded[:2], tmp_path / "checkpoint", 32)
    torch.manual_seed(9)
    again = load_pretraining_model(folder)
    assert loss_of(again) != loss_of(loaded)
    load_pretraining_checkpoint(again.model, tmp_path / "checkpoint")
    assert loss_of(again) == loss_of(loaded)
    for (name, weight), other in zip(loaded.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    rest = load_file(tmp_path / "checkpoint" / PRETRAINING_FILE)
    output = {"bert": "cls.predictions.decoder", "distilbert": "vocab_projector", "modernbert": "decoder"}[kind]
    assert (f"head.{output}.weight" in rest) == (not tied)
    assert not any(name.startswith("embedding.") for name in rest)
    words = Encoder(str(tmp_path / "checkpoint"), devices="cpu").model.backbone.get_input_embeddings().weight
    assert torch.equal(words, loaded.model.embedding.backbone.get_input_embeddings().weight)


def test_passed_state_dict_is_written(tmp_path):
    """As for sharded and compiled models."""
    loaded = load_pretraining_model(make_tiny(tmp_path / "lm", head=True, mask=True))
    state_dict = {
        name.replace("backbone.", "backbone._orig_mod."): w + 1 for name, w in loaded.model.state_dict().items()
    }
    save_pretraining_checkpoint(*loaded[:2], tmp_path / "checkpoint", 32, state_dict)
    written = {f"embedding.backbone.{name}": w for name, w in weights(tmp_path / "checkpoint").items()}
    written |= load_file(tmp_path / "checkpoint" / PRETRAINING_FILE)
    assert written.keys() == {name for name, _ in loaded.model.named_parameters()}
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(written[name], weight + 1)
    with pytest.raises(ValueError, match="state_dict does not match this model"):
        save_encoder(*loaded[:2], tmp_path / "other", 32, {"module.x": torch.zeros(1)})


def test_checkpoints_of_other_models_are_errors(tmp_path):
    folder = make_tiny(tmp_path / "lm", head=True, mask=True)
    loaded, wide = load_pretraining_model(folder), make_tiny(tmp_path / "wide", head=True, mask=True, hidden_size=32)
    before = loss_of(loaded)
    with pytest.raises(UserError, match=rf"checkpoint .*lm: {PRETRAINING_FILE} does not load"):
        load_pretraining_checkpoint(loaded.model, folder)
    other = load_pretraining_model(wide)
    save_pretraining_checkpoint(*other[:2], tmp_path / "checkpoint", 32)
    with pytest.raises(UserError, match="does not match this model: decoder"):
        load_pretraining_checkpoint(loaded.model, tmp_path / "checkpoint")
    deep = load_pretraining_model(make_tiny(tmp_path / "deep", head=True, mask=True, num_hidden_layers=3))
    save_pretraining_checkpoint(*deep[:2], tmp_path / "deeper", 32)
    with pytest.raises(UserError, match="does not match this model: embedding.backbone.encoder.layer.2"):
        load_pretraining_checkpoint(loaded.model, tmp_path / "deeper")
    assert loss_of(loaded) == before


def test_unsupported_models_are_errors(tmp_path):
    plain = make_tiny(tmp_path / "plain", head=True)
    with pytest.raises(UserError, match=rf"the tokenizer of {plain} has no mask token"):
        load_pretraining_model(plain)
    with pytest.raises(UserError, match="missing: --model_name_or_path, or --config_name and --tokenizer_name"):
        load_pretraining_model(config_name=plain)
    large = make_tiny(tmp_path / "large", mask=True, words=[*WORDS, *map(str, range(60))])
    with pytest.raises(UserError, match=rf"the tokenizer of {large} has the token .* with the id 64, .* below 64"):
        load_pretraining_model(plain, tokenizer_name=large)
    decoder = make_tiny(tmp_path / "decoder", "llama", mask=True)
    with pytest.raises(UserError, match="decoder does not load"):
        load_pretraining_model(decoder)
    with pytest.raises(UserError, match="is not one of a masked language model"):
        load_pretraining_model(config_name=decoder, tokenizer_name=decoder)
    adapters = tmp_path / "adapters"
    write_placeholders(adapters)
    (adapters / "model.safetensors").rename(adapters / "adapter_model.safetensors")
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": plain}))
    with pytest.raises(UserError, match="adapters cannot be pre-trained"):
        load_pretraining_model(str(adapters))


def test_model_with_missing_weights_is_an_error(tmp_path):
    """Only the head may be new: missing weights of the encoder would be initialized silently."""
    folder = make_tiny(tmp_path / "lm", head=True, mask=True)
    remaining = {name: w for name, w in weights(folder).items() if "layer.0.attention.self.query" not in name}
    save_file(remaining, Path(folder) / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights: bert.encoder.layer.0.attention.self.query.bias"):
        load_pretraining_model(folder)
