"""raybge's objective against FlagEmbedding 1.4.2 on the same embeddings."""

from types import SimpleNamespace

import pytest
import torch

from raybge.data.step_batch import Groups
from raybge.losses.objective import Objective

modeling = pytest.importorskip(
    "FlagEmbedding.finetune.embedder.encoder_only.base.modeling",
    reason="FlagEmbedding is not installed: pip install --no-deps FlagEmbedding==1.4.2",
)

B, G, D = 6, 4, 32
TEMPERATURE = 0.05


class GivenStates(torch.nn.Module):
    """A backbone whose hidden states are its input."""

    def forward(self, states: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=states)


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, D), torch.randn(B * G, D), torch.randn(B * G)


def theirs(teacher: torch.Tensor | None, **settings: object) -> tuple[float, torch.Tensor]:
    """Loss, and its gradient with respect to the vectors before normalization."""
    q, p, _ = vectors()
    states = torch.cat([q, p]).requires_grad_()
    model = modeling.BiEncoderOnlyEmbedderModel(
        GivenStates(), temperature=TEMPERATURE, normalize_embeddings=True, **settings
    ).train()
    one = {"attention_mask": torch.ones(B, 1)}, {"attention_mask": torch.ones(B * G, 1)}
    queries, passages = one[0] | {"states": states[:B, None]}, one[1] | {"states": states[B:, None]}
    loss = model(queries, passages, None if teacher is None else teacher.tolist()).loss
    loss.backward()
    return loss.item(), states.grad


def ours(teacher: torch.Tensor | None, **settings: object) -> tuple[float, torch.Tensor]:
    q, p, _ = vectors()
    states = torch.cat([q, p]).requires_grad_()
    e = torch.nn.functional.normalize(states, dim=-1)
    groups = Groups(torch.full((B,), G), teacher_score_M=teacher)
    loss = Objective(TEMPERATURE, **settings).loss(e[:B], e[B:], groups)
    loss.backward()
    return loss.item(), states.grad


@pytest.mark.parametrize(
    ("is_distilled", "their", "our"),
    [
        (False, {}, {}),
        (True, {"kd_loss_type": "kl_div"}, {"distillation": "kl_div"}),
        (True, {"kd_loss_type": "m3_kd_loss"}, {"distillation": "m3_kd_loss"}),
        (False, {"use_mrl": True, "mrl_dims": [8, 16, 32]}, {"mrl_dims": (8, 16, 32)}),
        (True, {"use_mrl": True, "mrl_dims": [8, 32]}, {"mrl_dims": (8, 32), "distillation": "kl_div"}),
    ],
    ids=["InfoNCE", "kl_div", "m3_kd_loss", "Matryoshka", "Matryoshka and kl_div"],
)
def test_loss_and_gradient_equal_flag_embedding(is_distilled, their, our):
    teacher = vectors()[2] if is_distilled else None
    (one, gradient), (other, other_gradient) = theirs(teacher, **their), ours(teacher, **our)
    assert other == pytest.approx(one, rel=1e-6)
    assert gradient.norm() > 0.1
    assert (gradient - other_gradient).norm() / gradient.norm() < 1e-6
