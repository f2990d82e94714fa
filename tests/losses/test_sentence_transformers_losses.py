"""raybge's objective against the losses of sentence-transformers on the same vectors: value and gradient."""

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.util import pairwise_cos_sim
from torch.nn.functional import normalize

from raybge.data.step_batch import Groups
from raybge.losses.objective import Objective

B, G, D = 6, 4, 32
TEMPERATURE = 0.05
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, D), torch.randn(B, G, D), torch.randn(B, G)


def theirs(loss: torch.nn.Module, labels: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    q, p, _ = vectors()
    states = torch.cat([q[:, None], p], dim=1).requires_grad_()
    value = loss.compute_loss_from_embeddings([normalize(each, dim=-1) for each in states.unbind(1)], labels)
    value.backward()
    return value.item(), states.grad


def ours(teacher: torch.Tensor | None, **settings: object) -> tuple[float, torch.Tensor]:
    q, p, _ = vectors()
    states = torch.cat([q[:, None], p], dim=1).requires_grad_()
    e = normalize(states, dim=-1)
    groups = Groups(torch.full((B,), G), teacher_score_M=None if teacher is None else teacher.flatten())
    loss = Objective(TEMPERATURE, **settings).loss(e[:, 0], e[:, 1:].reshape(-1, D), groups)
    loss.backward()
    return loss.item(), states.grad


def assert_equal(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    assert one[1].norm() > 1e-3
    assert (one[1] - other[1]).norm() / one[1].norm() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"directions": ALL},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")},
        {"directions": BOTH},
        {"directions": BOTH, "partition_mode": "per_direction"},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "directions": ALL},
    ],
    ids=["all", "Qwen3", "joint", "per direction", "in-batch", "hard", "all with all directions"],
)
def test_multiple_negatives_ranking(settings):
    loss = peer.MultipleNegativesRankingLoss(torch.nn.Module(), scale=1 / TEMPERATURE, **settings)
    assert_equal(theirs(loss, None), ours(None, **settings))


def test_margin_mse():
    _, _, teacher = vectors()
    assert_equal(
        theirs(peer.MarginMSELoss(torch.nn.Module()), teacher / 3),
        ours(teacher, distillation="margin_mse", teacher_temperature=3.0, contrastive_weight=0.0),
    )


def test_kl_divergence_with_temperatures():
    """Theirs lacks the teacher's entropy, and is multiplied by the student's temperature squared."""
    _, _, teacher = vectors()
    loss = peer.DistillKLDivLoss(torch.nn.Module(), student_temperature=TEMPERATURE, teacher_temperature=2.0)
    value, gradient = theirs(loss, teacher)
    weight = torch.softmax(teacher / 2, dim=1)
    entropy = -(weight * weight.log()).sum(dim=1).mean().item()
    expected = value / TEMPERATURE**2 + entropy, gradient / TEMPERATURE**2
    assert_equal(expected, ours(teacher, distillation="kl_div", teacher_temperature=2.0, contrastive_weight=0.0))


def test_cosent():
    """Theirs takes two columns: here each query as often as it has passages."""
    q, p, teacher = vectors()
    states = torch.cat([q[:, None], p], dim=1).requires_grad_()
    pairs = states[:, :1].expand(B, G, D).reshape(-1, D), states[:, 1:].reshape(-1, D)
    loss = peer.CoSENTLoss(torch.nn.Module(), scale=1 / TEMPERATURE)
    value = loss.compute_loss_from_embeddings([*pairs], teacher.flatten())
    value.backward()
    assert_equal((value.item(), states.grad), ours(teacher, distillation="cosent", contrastive_weight=0.0))


def test_score_mse():
    """Cosine similarity against a score in sentence-transformers' CosineSimilarityLoss."""
    q, p, teacher = vectors()
    states = torch.cat([q[:, None], p], dim=1).requires_grad_()
    cosine = pairwise_cos_sim(states[:, :1].expand(B, G, D).reshape(-1, D), states[:, 1:].reshape(-1, D))
    value = peer.CosineSimilarityLoss(torch.nn.Module()).loss_fct(cosine, teacher.flatten())
    value.backward()
    assert_equal((value.item(), states.grad), ours(teacher, distillation="score_mse", contrastive_weight=0.0))


def test_mean_weight_of_one_is_that_of_robinson():
    """The published form: positive e^p, negatives n times the mean of e^s under weights e^(beta s), s = cosine / t."""
    q, p, _ = vectors()
    beta = 0.4
    e, n = normalize(q, dim=-1), normalize(p.reshape(-1, D), dim=-1)
    score = e @ n.T / TEMPERATURE
    expected = []
    for b in range(B):
        positive = score[b, b * G]
        negative = torch.cat([score[b, : b * G], score[b, b * G + 1 :]])
        importance = torch.exp(beta * negative)
        reweighted = (importance * torch.exp(negative)).sum() / importance.mean()
        expected.append(-torch.log(torch.exp(positive) / (torch.exp(positive) + reweighted)))
    settings = {"hardness_mode": "all_negatives", "hardness_strength": beta / TEMPERATURE, "hardness_normalize": True}
    assert ours(None, **settings)[0] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
