"""What pre-training starts from and what it leaves: folders that others open, and checkpoints that continue."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import ENCODERS, WORDS, make_tiny

from raybge.data.jsonl import Row
from raybge.data.masking import TextMasker, unpack_masked
from raybge.losses.retromae_model import (
    PRETRAINING_FILE,
    load_checkpoint,
    load_pretraining_model,
    save_checkpoint,
    save_encoder,
)
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

TEXTS = ["lanes of rows", "what is a lane row block of the text that we read"]


def batch_of(tokenizer):
    rows = [Row(0, i, i, {}, text) for i, text in enumerate(TEXTS)]
    return unpack_masked(TextMasker(tokenizer, 32, seed=1)(0, 0, rows))


def loss_of(made):
    with torch.no_grad():
        return made.model.eval()(batch_of(made.tokenizer)).item()


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_language_model_keeps_its_head(tmp_path, kind):
    folder = make_tiny(tmp_path / "lm", kind, head=True, mask=True)
    lm = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    model, tokenizer, fresh = load_pretraining_model(folder)
    assert not fresh
    ids_BT = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        h_TD = model.eval().embedding.backbone(input_ids=ids_BT).last_hidden_state[0]
        torch.testing.assert_close(model._logits(h_TD), lm(input_ids=ids_BT).logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_embedding_model_gets_a_fresh_head_tied_to_its_embeddings(tmp_path, kind):
    folder = make_tiny(tmp_path / "embedding", kind, mask=True, tie_word_embeddings=False)
    model, _, fresh = load_pretraining_model(folder)
    assert fresh
    words = model.embedding.backbone.get_input_embeddings().weight
    assert model.head.get_output_embeddings().weight is words
    found = model.embedding.backbone.state_dict()
    for name, weight in transformers.AutoModel.from_pretrained(folder).state_dict().items():
        assert name.startswith("pooler.") or torch.equal(found[name], weight)


def test_a_folder_of_sentence_transformers_is_an_embedding_model_too(tmp_path):
    encoder = Encoder(make_tiny(tmp_path / "plain", mask=True), devices="cpu", passage_max_length=24)
    encoder.save(tmp_path / "finished")
    made = load_pretraining_model(str(tmp_path / "finished"))
    assert made.fresh_head
    word = made.model.embedding.backbone.get_input_embeddings().weight
    assert torch.equal(word, encoder.model.backbone.get_input_embeddings().weight)


def test_from_scratch(tmp_path):
    folder = make_tiny(tmp_path / "source", "distilbert", mask=True)
    torch.manual_seed(1)
    made = load_pretraining_model(config_name=folder, tokenizer_name=folder)
    assert made.fresh_head
    assert made.model.head.get_output_embeddings().weight is made.model.embedding.backbone.get_input_embeddings().weight
    assert not torch.equal(
        made.model.embedding.backbone.get_input_embeddings().weight,
        weights(folder)["embeddings.word_embeddings.weight"],
    )
    assert np.isfinite(loss_of(made))
    torch.manual_seed(1)
    assert loss_of(load_pretraining_model(config_name=folder, tokenizer_name=folder)) == loss_of(made)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_new_head_begins_with_the_shares_of_the_words(tmp_path, kind):
    """What it says of a vector that says nothing."""
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
def test_the_encoder_opens_everywhere_and_has_no_decoder(tmp_path, kind):
    made = load_pretraining_model(make_tiny(tmp_path / "lm", kind, head=True, mask=True))
    model = made.model.eval()
    saved = tmp_path / "saved"
    save_checkpoint(*made[:2], saved, 20)  # which has a decoder
    save_encoder(*made[:2], saved, 20)
    assert not (saved / PRETRAINING_FILE).exists()
    assert sum(w.numel() for w in weights(saved).values()) == sum(w.numel() for w in model.embedding.parameters())
    encoder = Encoder(str(saved), devices="cpu")
    assert (encoder.model.pooling, encoder.model.normalize, encoder.passage_max_length) == ("cls", True, 20)
    assert encoder.tokenizer.mask_token == "[MASK]"
    ids = [made.tokenizer(text)["input_ids"] for text in TEXTS]
    plain = transformers.AutoModel.from_pretrained(saved).eval()
    with torch.no_grad():
        expected, other = (
            torch.stack([m(input_ids=torch.tensor([row])).last_hidden_state[0, 0] for row in ids])
            for m in (model.embedding.backbone, plain)
        )
    assert torch.equal(expected, other)
    expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=1e-5)
    st = pytest.importorskip("sentence_transformers", reason="extra `dev`")
    np.testing.assert_allclose(st.SentenceTransformer(str(saved), device="cpu").encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_a_checkpoint_holds_all_and_is_an_encoder_too(tmp_path, kind, tied):
    folder = make_tiny(tmp_path / "lm", kind, head=True, mask=True, tie_word_embeddings=tied)
    made = load_pretraining_model(folder)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    save_checkpoint(*made[:2], tmp_path / "checkpoint", 32)
    torch.manual_seed(9)
    again = load_pretraining_model(folder)
    assert loss_of(again) != loss_of(made)
    load_checkpoint(again.model, tmp_path / "checkpoint")
    assert loss_of(again) == loss_of(made)
    for (name, weight), other in zip(made.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    rest = load_file(tmp_path / "checkpoint" / PRETRAINING_FILE)
    output = {"bert": "cls.predictions.decoder", "distilbert": "vocab_projector", "modernbert": "decoder"}[kind]
    assert (f"head.{output}.weight" in rest) == (not tied)
    assert not any(name.startswith("embedding.") for name in rest)
    words = Encoder(str(tmp_path / "checkpoint"), devices="cpu").model.backbone.get_input_embeddings().weight
    assert torch.equal(words, made.model.embedding.backbone.get_input_embeddings().weight)


def test_weights_that_are_handed_in_are_those_that_are_written(tmp_path):
    """As of sharded and of compiled models."""
    made = load_pretraining_model(make_tiny(tmp_path / "lm", head=True, mask=True))
    given = {name.replace("backbone.", "backbone._orig_mod."): w + 1 for name, w in made.model.state_dict().items()}
    save_checkpoint(*made[:2], tmp_path / "checkpoint", 32, given)
    written = {f"embedding.backbone.{name}": w for name, w in weights(tmp_path / "checkpoint").items()}
    written |= load_file(tmp_path / "checkpoint" / PRETRAINING_FILE)
    assert written.keys() == {name for name, _ in made.model.named_parameters()}
    for name, weight in made.model.named_parameters():
        assert torch.equal(written[name], weight + 1)
    with pytest.raises(ValueError, match="state_dict does not match this model"):
        save_encoder(*made[:2], tmp_path / "other", 32, {"module.x": torch.zeros(1)})


def test_wrong_checkpoints_are_named(tmp_path):
    folder = make_tiny(tmp_path / "lm", head=True, mask=True)
    made, wide = load_pretraining_model(folder), make_tiny(tmp_path / "wide", head=True, mask=True, hidden_size=32)
    before = loss_of(made)
    with pytest.raises(UserError, match=rf"checkpoint .*lm: {PRETRAINING_FILE} does not load"):
        load_checkpoint(made.model, folder)
    other = load_pretraining_model(wide)
    save_checkpoint(*other[:2], tmp_path / "checkpoint", 32)
    with pytest.raises(UserError, match="does not match this model: decoder"):
        load_checkpoint(made.model, tmp_path / "checkpoint")
    deep = load_pretraining_model(make_tiny(tmp_path / "deep", head=True, mask=True, num_hidden_layers=3))
    save_checkpoint(*deep[:2], tmp_path / "deeper", 32)
    with pytest.raises(UserError, match="does not match this model: embedding.backbone.encoder.layer.2"):
        load_checkpoint(made.model, tmp_path / "deeper")
    assert loss_of(made) == before


def test_what_cannot_be_pre_trained_is_named(tmp_path):
    plain = make_tiny(tmp_path / "plain", head=True)
    with pytest.raises(UserError, match=rf"the tokenizer of {plain} has no mask token"):
        load_pretraining_model(plain)
    with pytest.raises(UserError, match="missing: --model_name_or_path, or --config_name and --tokenizer_name"):
        load_pretraining_model(config_name=plain)
    large = make_tiny(tmp_path / "large", mask=True, words=[*WORDS, *map(str, range(60))])
    with pytest.raises(UserError, match=rf"the tokenizer of {large} has token ids up to \d+.* below 64"):
        load_pretraining_model(plain, tokenizer_name=large)
    decoder = make_tiny(tmp_path / "decoder", "llama", mask=True)
    with pytest.raises(UserError, match="decoder does not load"):
        load_pretraining_model(decoder)
    with pytest.raises(UserError, match="is not one of a masked language model"):
        load_pretraining_model(config_name=decoder, tokenizer_name=decoder)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name, text in {"adapter_config.json": {"base_model_name_or_path": plain}, "adapter_model.bin": {}}.items():
        (adapters / name).write_text(json.dumps(text))
    with pytest.raises(UserError, match="adapters cannot be pre-trained"):
        load_pretraining_model(str(adapters))


def test_a_model_with_holes_is_not_taken(tmp_path):
    """Only the head may be new: weights that the encoder lacks would be random without a word."""
    folder = make_tiny(tmp_path / "lm", head=True, mask=True)
    kept = {name: w for name, w in weights(folder).items() if "layer.0.attention.self.query" not in name}
    save_file(kept, Path(folder) / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights: bert.encoder.layer.0.attention.self.query.bias"):
        load_pretraining_model(folder)
