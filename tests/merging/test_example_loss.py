"""Losses on examples, against plain ones written out here, transformers' own and the recipe's package."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import changed, make_t5, make_tiny

from raybge.data.groups import Group
from raybge.merging.example_loss import Examples, contrastive_loss, draw_negatives, generation_loss, weights_of
from raybge.model.encoder import Encoder
from raybge.model.folder import FolderSettings, write_settings
from raybge.util.errors import UserError

GROUPS = [
    Group("what is a lane", ("a row of text",), ("sort by length", "one node", "read in chunks"), None),
    Group("we sort", ("sort by length and read",), ("the block",), None),
    Group("chunks", ("one block of rows",), (), "the text "),
]
PAIRS = [("what is a lane", "a row of text"), ("we sort", "by length"), ("read", "the block of one node in chunks")]


def test_weights_are_the_softmax_of_minus_the_loss():
    losses = [0.3, 2.5, 900.0]
    expected = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / 5.0, dim=0)
    found = weights_of(losses, 5.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert sum(found) == pytest.approx(1) and weights_of([1e9, 1e9], 0.1) == [0.5, 0.5]


@pytest.fixture
def embedder(tmp_path) -> str:
    """Mean pooling, not normalised, with prompts: the loss normalises and puts them in front."""
    folder = changed(make_tiny(tmp_path / "embedder", pooler=False), 1)
    prompts = {"query": "what ", "document": "row "}
    write_settings(folder, FolderSettings("mean", False, prompts, max_length=16), 16, {})
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_contrastive_loss_is_the_plain_one(embedder, batch_size):
    encoder = Encoder(embedder, normalize_embeddings=True, devices="cpu")
    losses = []
    for start in range(0, len(GROUPS), batch_size):
        batch = GROUPS[start : start + batch_size]
        asked = [(g.prompt or "what ") + g.query for g in batch]
        texts = [f"row {text}" for g in batch for text in (*g.pos, *g.neg)]
        q_BD, p_ND = (encoder.encode(each, convert_to_numpy=False) for each in (asked, texts))
        right = [texts.index(f"row {g.pos[0]}") for g in batch]
        losses += torch.nn.functional.cross_entropy(
            q_BD @ p_ND.T / 0.05, torch.tensor(right), reduction="none"
        ).tolist()
    with torch.no_grad():
        assert contrastive_loss(encoder, GROUPS, batch_size) == pytest.approx(np.mean(losses), rel=1e-4)
    if batch_size == 1:
        assert losses[2] == pytest.approx(0, abs=1e-6)  # alone, and without negatives
    found = Examples("encoder", GROUPS, batch_size, neg_number=9).loss(embedder, 1, "cpu")
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_negatives_are_drawn_once_for_all_models():
    many = Group("q", ("p", "p2"), tuple(map(str, range(50))), "x")
    drawn = [draw_negatives(many, 7, seed, number) for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert drawn[0] == drawn[1] and len({each.neg for each in drawn}) == 3
    for each in drawn:
        assert each.pos == ("p",) and each.prompt == "x" and len({*each.neg}) == 7
    assert draw_negatives(GROUPS[0], 7, 1, 0) == GROUPS[0]
    assert draw_negatives(GROUPS[0], 0, 1, 0).neg == ()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_the_loss_of_an_output_is_transformers_own(tmp_path, kind):
    """Which takes the mean over the tokens of a batch: with one example it is that example's."""
    make = make_t5 if kind == "encoder-decoder" else lambda folder: make_tiny(folder, "qwen3", head=True)
    folder = changed(make(tmp_path / "model"), 1)
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
            labels[:, : len(words.encode(text)) - 1] = -100  # this tokenizer ends a text with a token
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            losses.append(float(model(**inputs, labels=labels).loss))
    assert np.std(losses) > 0.05
    for batch_size in (1, 2, 3):
        found = Examples(kind, PAIRS, batch_size).loss(folder, 1, "cpu")
        assert found == pytest.approx(np.mean(losses), rel=1e-4), "the loss depends on the batch"


def test_an_input_that_leaves_no_room_is_named(tmp_path):
    folder = make_tiny(tmp_path / "model", "qwen3", head=True)
    with pytest.raises(UserError, match="example 2: its input alone is longer than --max_input_length 4"):
        Examples("decoder", [("a", "row"), ("what is a lane row", "block")], 2, 4).loss(folder, 1, "cpu")


def test_tokens_beyond_the_length_are_not_seen():
    """A model whose loss would tell: it gives each token the probability 1/8 times its place."""

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.arange(input_ids.shape[1])[None, :, None] * torch.eye(64)[input_ids + 1])

    model.config = SimpleNamespace(is_encoder_decoder=False)
    model.device = "cpu"
    words = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()], eos_token_id=None, pad_token_id=0)
    short, long = (generation_loss(model, words, [("a bb", f"ccc dddd{more}")], 1, 4) for more in ("", " ee f ggg"))
    assert short == long != generation_loss(model, words, [("a bb", "ccc dddd ee f ggg")], 1, 9)


def test_the_recipes_package_finds_the_same_weights(tmp_path):
    """For one batch of all examples: it repeats earlier ones in later batches. First token, normalised, as it is."""
    try:
        from LM_Cocktail import utils
    except ImportError as error:
        pytest.skip(f"lm-cocktail 0.0.4 cannot be imported ({error}): pip install --no-deps --target DIR lm-cocktail")
    names = [changed(make_tiny(tmp_path / str(i), pooler=False), i) for i in range(3)]
    rows = [{"query": g.query, "pos": list(g.pos), "neg": ["sort by length", "one node"]} for g in GROUPS[:2]]
    models = [transformers.AutoModel.from_pretrained(name).eval() for name in names]
    words = transformers.AutoTokenizer.from_pretrained(names[0])
    states = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in models]
    more = {"model_type": "encoder", "example_data": rows, "batch_size": 2, "max_input_length": 16, "neg_number": 2}
    theirs = utils.compute_weights(models[0], words, states, temperature=0.7, **more)
    groups = [Group(row["query"], tuple(row["pos"]), tuple(row["neg"]), None) for row in rows]
    losses = [Examples("encoder", groups, 2, 16, 2).loss(name, 1, "cpu") for name in names]
    np.testing.assert_allclose(weights_of(losses, 0.7), theirs, rtol=1e-3)
    assert np.std(theirs) > 0.01
