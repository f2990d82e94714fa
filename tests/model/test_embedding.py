"""Pooling, chunks and padding of the network."""

import pytest
import torch
import transformers
from torch import Tensor

from raybge.model.embedding import EmbeddingModel, max_positions, plan_chunks
from raybge.util.errors import UserError

POOLINGS = ["cls", "mean", "last_token"]
# two texts of one length, the longest in the middle, the shortest possible; ids without the padding's
TEXTS = [[2, 9, 3], [2, *range(10, 30), 3], [2, 3], [2, 8, 3], [2, *range(5, 12), 3]]
# fp32 with unit vectors: sums in another order move the last bits only
TOLERANCE = 1e-5


def load(folder: str, pooling: str = "mean", normalize: bool = True) -> EmbeddingModel:
    return EmbeddingModel(transformers.AutoModel.from_pretrained(folder), pooling, normalize).eval()


def pool_by_hand(model: EmbeddingModel, ids: list[int]) -> Tensor:
    """One text alone, without any padding, through the backbone; the definition of each pooling."""
    h_TD = model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
    e_D = {"cls": h_TD[0], "mean": h_TD.mean(0), "last_token": h_TD[-1]}[model.pooling]
    return e_D / e_D.norm() if model.normalize else e_D


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_poolings_equal_their_definitions(tiny, kind, pooling, normalize):
    model = load(tiny(kind), pooling, normalize)
    with torch.no_grad():
        expected = torch.stack([pool_by_hand(model, ids) for ids in TEXTS])
        torch.testing.assert_close(model.embed(TEXTS, 10_000), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 0.05, "all texts look alike to this model: the test could not fail"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunks_and_padding_have_no_effect_on_vectors(tiny, kind, pooling):
    model = load(tiny(kind), pooling, normalize=False)  # a unit length would hide a wrong mean
    with torch.no_grad():
        one_batch = model.embed(TEXTS, 10_000)
        for tokens_per_chunk in (1, 22, 44, 60):
            torch.testing.assert_close(model.embed(TEXTS, tokens_per_chunk), one_batch, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(model.embed(TEXTS, 44, pad_to_multiple_of=8), one_batch, rtol=0, atol=TOLERANCE)


def test_padding_to_a_multiple_stops_at_the_maximal_length(tiny):
    model = load(tiny())
    widths = []
    model.backbone.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.embed([[2, 3], [2, *[5] * 28, 3]], 1, pad_to_multiple_of=12)
    assert widths == [32, 12]


def test_gradient_equals_that_of_one_padded_batch(tiny):
    # a random direction for each text: a mean of unit vectors alone would hide rows that changed places
    weights_ND = torch.randn(len(TEXTS), 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for chunked in (False, True):
        model = load(tiny())
        if chunked:
            e_ND = model.embed(TEXTS, 44)
        else:
            e_ND = model(*model.pad(TEXTS, range(len(TEXTS))))
        (e_ND * weights_ND).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 1
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_every_trained_parameter_gets_a_gradient(tiny):
    model = load(tiny())
    model.embed(TEXTS, 44).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # the unused pooler would be here, and data-parallel training would wait for it


def test_padding_is_on_the_right_with_the_models_id(tiny):
    # seen by no vector of these models; others take what is padding from the ids
    ids_BT, mask_BT = load(tiny("roberta")).pad([[0, 9, 8, 2], [0, 2]], [1, 0])
    assert ids_BT.tolist() == [[0, 2, 1, 1], [0, 9, 8, 2]]
    assert mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_no_texts_give_no_rows(tiny):
    assert load(tiny()).embed([], 100).shape == (0, 16)


def test_chunks_hold_each_row_once_within_the_budget():
    lengths = [5, 1, 9, 9, 3, 40, 2, 0, 7]
    for budget in (1, 8, 18, 27, 1000):
        chunks = plan_chunks(lengths, budget)
        assert sorted(row for rows in chunks for row in rows) == list(range(len(lengths)))
        for rows in chunks:
            assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    # equal lengths keep their order: the same list must give the same chunks, and so the same bits
    assert plan_chunks([3] * 8, 6) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="tokens_per_chunk"):
        plan_chunks(lengths, 0)


def test_sub_batches_by_tokens_count_the_padding(tiny):
    """The tensors of each chunk, as the network receives them, hold at most so many tokens; a longer text is alone."""
    model = load(tiny())
    texts = [[7] * n for n in (30, 20, 20, 17, 16, 15, 9, 3, 1, 1)]
    shapes: list[tuple[int, int]] = []
    model.backbone.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.embed(texts, 4096, sub_batch_tokens=64)
    assert sum(rows for rows, _ in shapes) == len(texts) and max(rows * width for rows, width in shapes) == 64
    assert len(shapes) < len(texts) / 2
    shapes.clear()
    model.embed(texts, 4096, sub_batch_tokens=24)
    assert all(rows * width <= 24 or rows == 1 for rows, width in shapes)


def test_maximal_length_of_roberta_is_less_than_its_positions(tiny):
    # 34 rows in both tables' configuration would be wrong by two: positions start behind the padding's id
    assert max_positions(load(tiny("roberta")).backbone) == 32
    assert max_positions(load(tiny("bert", "other")).backbone) == 32


def test_unknown_pooling_is_an_error(tiny):
    with pytest.raises(UserError, match="pooling 'max': expected one of cls, mean, last_token"):
        load(tiny(), "max")
