"""Losses on examples, compared with plain implementations, with transformers and with LM-Cocktail."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import make_t5, make_tiny, perturb_weights

from raybge.data.groups import Group
from raybge.merging.example_loss import (
    ExampleSet,
    contrastive_loss,
    generation_loss,
    sample_negatives,
    weights_from_losses,
)
from raybge.model.encoder import Encoder
from raybge.model.folder import FolderSettings, write_settings
from raybge.util.errors import UserError

GROUPS = [
    Group("what is a lane", ("a row of text",), ("sort by length", "one node", "read in chunks"), None),
    Group("we sort", ("sort by length and read",), ("the block",), None),
    Group("chunks", ("one block of rows",), (), "the text "),
]
PAIRS = [("what is a lane", "a row of text"), ("we sort", "by length"), ("read", "the block of one node in chunks")]


def test_weights_are_the_softmax_of_negative_losses():
    losses = [0.3, 2.5, 900.0]
    expected = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / 5.0, dim=0)
    weights = weights_from_losses(losses, 5.0)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert sum(weights) == pytest.approx(1) and weights_from_losses([1e9, 1e9], 0.1) == [0.5, 0.5]


@pytest.fixture
def embedder(tmp_path) -> str:
    """A model with mean pooling, without normalization and with prompts; the loss normalizes and adds the prompts."""
    folder = perturb_weights(make_tiny(tmp_path / "embedder", pooler=False), 1)
    prompts = {"query": "what ", "document": "row "}
    write_settings(folder, FolderSettings("mean", False, prompts, max_length=16), 16, {})
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_contrastive_loss_matches_plain_cross_entropy(embedder, batch_size):
    encoder = Encoder(embedder, normalize_embeddings=True, devices="cpu")
    losses = []
    for start in range(0, len(GROUPS), batch_size):
        batch = GROUPS[start : start + batch_size]
        queries = [(g.prompt or "what ") + g.query for g in batch]
        texts = [f"row {text}" for g in batch for text in (*g.pos, *g.neg)]
        q_BD, p_ND = (encoder.encode(each, convert_to_numpy=False) for each in (queries, texts))
        labels = [texts.index(f"row {g.pos[0]}") for g in batch]
        losses += torch.nn.functional.cross_entropy(
            q_BD @ p_ND.T / 0.05, torch.tensor(labels), reduction="none"
        ).tolist()
    with torch.no_grad():
        assert contrastive_loss(encoder, GROUPS, batch_size) == pytest.approx(np.mean(losses), rel=1e-4)
    if batch_size == 1:
        assert losses[2] == pytest.approx(0, abs=1e-6)  # alone in its batch, without negatives
    loss = ExampleSet("encoder", GROUPS, batch_size, neg_number=9).loss(embedder, 1, "cpu")
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_negatives_are_equal_for_all_models():
    many = Group("q", ("p", "p2"), tuple(map(str, range(50))), "x")
    samples = [sample_negatives(many, 7, seed, number) for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert samples[0] == samples[1] and len({each.neg for each in samples}) == 3
    for each in samples:
        assert each.pos == ("p",) and each.prompt == "x" and len({*each.neg}) == 7
    assert sample_negatives(GROUPS[0], 7, 1, 0) == GROUPS[0]
    assert sample_negatives(GROUPS[0], 0, 1, 0).neg == ()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_generation_loss_matches_transformers(tmp_path, kind):
    """transformers averages over the tokens of a batch, which is one example here."""
    make = make_t5 if kind == "encoder-decoder" else lambda folder: make_tiny(folder, "qwen3", head=True)
    folder = perturb_weights(make(tmp_path / "model"), 1)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "encoder-decoder" else transformers.AutoModelForCausalLM
    model, words = auto.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    words.padding_side = "right"
    losses = []
    for text, output in PAIRS:
        if kind == "encoder-decoder":
            inputs, labels = words(text, return_tensors="pt"), words(output, return_tensors="pt")["input_ids"]
        else:
            inputs = words(f"{text} {output}", return_tensors="pt")
            labels = inputs["input_ids"].clone()
            labels[:, : len(words.encode(text)) - 1] = -100  # this tokenizer appends an end token
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            losses.append(float(model(**inputs, labels=labels).loss))
    assert np.std(losses) > 0.05
    for batch_size in (1, 2, 3):
        loss = ExampleSet(kind, PAIRS, batch_size).loss(folder, 1, "cpu")
        assert loss == pytest.approx(np.mean(losses), rel=1e-4), "the loss depends on the batch"


def test_input_without_room_for_output_is_an_error(tmp_path):
    folder = make_tiny(tmp_path / "model", "qwen3", head=True)
    with pytest.raises(UserError, match="example 2: its input fills --max_input_length 4"):
        ExampleSet("decoder", [("a", "row"), ("what is a lane row", "block")], 2, 4).loss(folder, 1, "cpu")


def test_tokens_beyond_max_length_are_ignored():
    """The loss of this model depends on every token: the logits are proportional to the position."""

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.arange(input_ids.shape[1])[None, :, None] * torch.eye(64)[input_ids + 1])

    model.config = SimpleNamespace(is_encoder_decoder=False)
    model.device = "cpu"
    words = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()], eos_token_id=None, pad_token_id=0)
    short, long = (generation_loss(model, words, [("a bb", f"ccc dddd{more}")], 1, 4) for more in ("", " ee f ggg"))
    assert short == long != generation_loss(model, words, [("a bb", "ccc dddd ee f ggg")], 1, 9)


def test_weights_match_lm_cocktail(tmp_path):
    """Compared on one batch, since LM-Cocktail repeats earlier examples in later batches; it pools the first token."""
    try:
        from LM_Cocktail import utils
    except ImportError as error:
        pytest.skip(f"lm-cocktail 0.0.4 cannot be imported ({error}): pip install --no-deps --target DIR lm-cocktail")
    names = [perturb_weights(make_tiny(tmp_path / str(i), pooler=False), i) for i in range(3)]
    rows = [{"query": g.query, "pos": list(g.pos), "neg": ["sort by length", "one node"]} for g in GROUPS[:2]]
    models = [transformers.AutoModel.from_pretrained(name).eval() for name in names]
    words = transformers.AutoTokenizer.from_pretrained(names[0])
    states = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in models]
    more = {"model_type": "encoder", "example_data": rows, "batch_size": 2, "max_input_length": 16, "neg_number": 2}
    theirs = utils.compute_weights(models[0], words, states, temperature=0.7, **more)
    groups = [Group(row["query"], tuple(row["pos"]), tuple(row["neg"]), None) for row in rows]
    losses = [ExampleSet("encoder", groups, 2, 16, 2).loss(name, 1, "cpu") for name in names]
    np.testing.assert_allclose(weights_from_losses(losses, 0.7), theirs, rtol=1e-3)
    assert np.std(theirs) > 0.01
