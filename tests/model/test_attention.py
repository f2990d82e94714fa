"""Models with raybge's attention against transformers' own: in training, in evaluation, and with packed texts."""

import copy

import numpy as np
import pytest
import torch
from tiny import make_tiny
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from raybge.model.attention import NAME, use_fast_attention
from raybge.model.encoder import Encoder
from raybge.model.packing import packing_failure, prepare_for_training

SIZE = {"vocab_size": 50, "max_position_embeddings": 32}
MODELS = {
    "bert": lambda: BertModel(
        BertConfig(**SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SIZE, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_drops_in_training_alone(name):
    torch.manual_seed(0)
    stock = MODELS[name]()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    assert fast.config._attn_implementation == NAME
    inputs = {
        "input_ids": torch.randint(5, 50, (3, 9)),
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [4], [1]])).long(),
    }
    mask_BT = inputs["attention_mask"].bool()

    def run(model: torch.nn.Module) -> torch.Tensor:
        return model(**inputs).last_hidden_state[mask_BT]

    assert torch.allclose(run(fast.eval()), run(stock.eval()), atol=1e-6)
    # In training: another draw each time, around the same mean as torch's own.
    fast.train(), stock.train()
    with torch.no_grad():
        ours = torch.stack([run(fast) for _ in range(200)])
        theirs = torch.stack([run(stock) for _ in range(200)])
    assert not torch.equal(ours[0], ours[1])
    error = ((ours.var(0) + theirs.var(0)) / 200).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() / error.clamp(min=1e-6)).mean() < 1.2  # 0.8 is expected of noise
    assert ours.std(0).mean().item() == pytest.approx(theirs.std(0).mean().item(), rel=0.1)


def test_saved_configuration_has_the_original_attention(tmp_path):
    model = MODELS["bert"]()
    use_fast_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


# --- packed texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_packed_texts_have_the_vectors_and_gradients_of_padded_ones(tmp_path, kind, pooling):
    """With more tokens in the row than the model has positions: positions start again in each text."""
    model = Encoder(make_tiny(tmp_path / kind, kind, dropout=0.0), pooling_method=pooling).model.train()
    random = np.random.default_rng(0)
    texts = [random.integers(4, 20, n) for n in (31, 2, 17, 1, 32)]
    direction = torch.randn(5, model.dim)
    assert prepare_for_training(model) is None and not model.packs  # on a CPU a padded chunk is as fast

    def run(packs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.packs = packs
        model.zero_grad()
        e = model.embed(texts, 4096, sub_batch_size=3)
        (e * direction).sum().backward()
        return e.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (padded, gradient), (packed, packed_gradient) = run(False), run(True)
    assert torch.allclose(padded, packed, atol=1e-5)
    assert gradient.norm() > 0.1
    assert (gradient - packed_gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "qwen3", "llama"])
def test_model_packs_only_if_the_vectors_are_equal(tmp_path, kind):
    """Models that report packing compute the vectors of padded texts, here for texts that the check does not use."""
    model = Encoder(make_tiny(tmp_path / kind, kind, dropout=0.0)).model.eval()
    use_fast_attention(model.backbone)
    right = packing_failure(model, None, None) is None
    assert right or kind not in ("bert", "roberta")
    if right:
        random = np.random.default_rng(1)
        texts = [random.integers(4, 20, n) for n in (9, 30, 14)]
        with torch.no_grad():
            padded = model.embed(texts, 4096)
            model.packs = True
            assert torch.allclose(padded, model.embed(texts, 4096), atol=1e-5)
