"""The gradient of W processes, sub-batches and blocks of scores against plain loops that follow the definitions."""

import hashlib
import itertools
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from process_runtime import run_in_processes
from transformers import BertConfig, BertModel

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.global_batch import gather_counts, gather_rows
from raybge.losses.objective import Objective
from raybge.model.embedding import EmbeddingModel

GROUPS = 8
TEMPERATURE = 0.05
BLOCK = 3
Q2D, D2Q, Q2Q, D2D = "query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"
BOTH = {"directions": (Q2D, D2Q), "partition_mode": "per_direction"}
NORMALIZED = {"hardness_normalize": True}
BANDS = ((-1.0, 0.25), (0.5, 1.0), (2.5, 2.0))
PLAIN = Objective(TEMPERATURE, mask_known=False)
OBJECTIVES = {
    "cross-worker": PLAIN,
    "blocks": replace(PLAIN, cross_device=False, block=BLOCK),
    "no in-batch": replace(PLAIN, in_batch=False),
    "bidirectional": replace(PLAIN, **BOTH),
    "joint, both": replace(PLAIN, directions=(Q2D, D2Q)),
    "joint, all": replace(PLAIN, directions=(Q2D, D2Q, Q2Q, D2D)),
    "joint, all, blocks": replace(PLAIN, directions=(Q2D, D2Q, Q2Q, D2D), cross_device=False, block=BLOCK),
    "joint, Qwen3": replace(PLAIN, directions=(Q2D, Q2Q, D2D), margin=-0.1, mask_known=True),
    "joint, all, alone": replace(PLAIN, directions=(Q2D, D2Q, Q2Q, D2D), mask_known=True),
    "joint, all, margin by guide": replace(PLAIN, directions=(Q2D, D2Q, Q2Q, D2D), margin=0.05),
    "hardness, in-batch": replace(PLAIN, hardness_mode="in_batch_negatives", hardness_strength=9.0),
    "hardness, hard": replace(PLAIN, hardness_mode="hard_negatives", hardness_strength=5.0),
    "hardness, all": replace(PLAIN, hardness_mode="all_negatives", hardness_strength=5.0, mask_known=True),
    "hardness, all, mean 1": replace(PLAIN, hardness_mode="all_negatives", hardness_strength=8.0, **NORMALIZED),
    "hardness, in-batch, mean 1, alone": replace(
        PLAIN, hardness_mode="in_batch_negatives", hardness_strength=8.0, mask_known=True, margin=0.05, **NORMALIZED
    ),
    "margin_mse": replace(PLAIN, distillation="margin_mse", teacher_temperature=4.0, contrastive_weight=0.5),
    "score_mse": replace(PLAIN, distillation="score_mse", teacher_temperature=4.0, contrastive_weight=0.0),
    "cosent": replace(PLAIN, distillation="cosent", contrastive_weight=0.5),
    "kl_div, teacher's temperature": replace(PLAIN, distillation="kl_div", teacher_temperature=3.0),
    "soft_labels": replace(PLAIN, distillation="soft_labels", score_bands=BANDS, mask_known=True, margin=0.05),
    "soft_labels, bidirectional": replace(PLAIN, distillation="soft_labels", score_bands=BANDS, **BOTH),
    "Matryoshka": replace(PLAIN, mrl_dims=(8, 32)),
    "kl_div": replace(PLAIN, distillation="kl_div"),
    "m3_kd_loss": replace(PLAIN, distillation="m3_kd_loss"),
    "m3_kd_loss, no in-batch": replace(PLAIN, distillation="m3_kd_loss", in_batch=False),
    "known masked": replace(PLAIN, mask_known=True),
    "known masked, bidirectional": replace(PLAIN, mask_known=True, **BOTH),
    "margin": replace(PLAIN, margin=0.05),
    "margin by guide": replace(PLAIN, margin=0.05),
    "margin by guide, bidirectional": replace(PLAIN, margin=0.05, **BOTH),
    "alone": PLAIN,
    "everything": replace(PLAIN, mask_known=True, margin=0.05, mrl_dims=(8, 32), distillation="kl_div", **BOTH),
    "everything, joint": replace(
        PLAIN,
        mask_known=True,
        margin=0.05,
        directions=(Q2D, D2Q, Q2Q, D2D),
        hardness_mode="all_negatives",
        hardness_strength=8.0,
        mrl_dims=(8, 32),
        distillation="cosent",
        **NORMALIZED,
    ),
}
# How the same numbers are computed: texts and tokens whose activations are held, passages scored at a time.
WAYS = {
    "plain": (None, None, None),
    "sub-batched": (3, None, None),
    "by tokens": (None, 40, None),
    "blocked": (None, None, 5),
    "both": (2, None, 4),
}
# Groups of each worker, and the ways that are compared. Blocks of 3 straddle the workers in every one of them.
SHARES = {(8,): ("plain", "by tokens", "both"), (5, 3): ("plain", "by tokens", "both"), (0, 6, 2): tuple(WAYS)}


@dataclass
class Outcome:
    loss: float
    gradient: torch.Tensor


# --- one fixed global batch -------------------------------------------------------------------------------------------

_random = np.random.default_rng(7)
SIZES = [3, 1, 2, 3, 3, 2, 1, 3]
QUERIES = [_random.integers(5, 90, _random.integers(2, 9)) for _ in range(GROUPS)]
PASSAGES = [[_random.integers(5, 90, _random.integers(2, 15)) for _ in range(n)] for n in SIZES]
PASSAGES[5][1] = PASSAGES[1][0]  # a negative with the text of another group's positive
PASSAGES[7][0] = PASSAGES[3][0]  # two groups with one positive
QUERIES[6] = QUERIES[0]  # two groups with one query
TEACHER = [_random.normal(0, 2, n).astype(np.float32) for n in SIZES]
ALONE = [False, True, False, False, True, False, False, False]


def key(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big", signed=True)


# Beside the one that was drawn, group 2 knows the positive of group 6.
KNOWN = [[key(p[0])] + ([key(PASSAGES[6][0])] if g == 2 else []) for g, p in enumerate(PASSAGES)]


def batch_of(first: int, count: int, alone: bool) -> StepBatch:
    """Groups [first, first + count): texts of different lengths, one to three passages per group."""
    held = range(first, first + count)
    passages = [p for i in held for p in PASSAGES[i]]
    token_ids = [QUERIES[i] for i in held] + passages
    return StepBatch(
        step=0,
        rows=[(0, i) for i in held],
        token_ids=token_ids,
        groups=Groups(
            passages_B=np.array([SIZES[i] for i in held], dtype=np.int64),
            alone_B=np.array([ALONE[i] and alone for i in held], dtype=bool),
            passage_key_M=np.array([key(p) for p in passages], dtype=np.int64),
            known_B=np.array([len(KNOWN[i]) for i in held], dtype=np.int64),
            known_key_R=np.array([k for i in held for k in KNOWN[i]], dtype=np.int64),
            teacher_score_M=np.concatenate([np.zeros(0, np.float32), *(TEACHER[i] for i in held)]),
            query_key_B=np.array([key(QUERIES[i]) for i in held], dtype=np.int64),
        ),
        guide_ids=token_ids,
    )


def embedding_of(seed: int) -> EmbeddingModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return EmbeddingModel(BertModel(config), "mean", True)


def model_of(name: str, way: str = "plain") -> ContrastiveModel:
    sub_batch_size, sub_batch_tokens, score_block = WAYS[way]
    objective = replace(OBJECTIVES[name], score_block=score_block)
    guide = embedding_of(1) if "guide" in name else None
    return ContrastiveModel(embedding_of(0), objective, None, sub_batch_size, guide, sub_batch_tokens)


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# --- the definitions, one query at a time -----------------------------------------------------------------------------


def cosine(a, b):
    return torch.dot(a, b) / (a.norm() * b.norm())


def compared(name, objective, cosine_of, limit, g, group, is_known) -> bool:
    """Return True if a text of group g is compared with a text of another group, or with any but its target."""
    ok = objective.in_batch or group == g
    ok &= objective.cross_device or group // BLOCK == g // BLOCK
    ok &= "alone" not in name or not ALONE[g] or group == g
    ok &= not (objective.mask_known and is_known)
    return bool(ok and (objective.margin is None or cosine_of() <= limit))


def labels_of(teacher) -> list[float]:
    labels = [max([0.0, *(label for bound, label in BANDS if score >= bound)]) for score in teacher.tolist()]
    return labels if sum(labels) else [1.0] + [0.0] * (len(labels) - 1)


def by_definition(name: str) -> Outcome:
    """Loss and gradient from embeddings computed one text at a time."""
    objective = OBJECTIVES[name]
    model = embedding_of(0)
    guide = embedding_of(1) if "guide" in name else model
    flat = [p for group in PASSAGES for p in group]
    with torch.no_grad():
        guides = [[guide.embed([ids], 64)[0] for ids in texts] for texts in (QUERIES, flat)]
    vectors = [[model.embed([ids], 64)[0] for ids in texts] for texts in (QUERIES, flat)]
    total = torch.zeros(())
    for dim in objective.mrl_dims or (32,):
        total = (
            total + Definition(name, *([v[:dim] / v[:dim].norm() for v in each] for each in vectors), *guides).loss()
        )
    total = total / max(1, len(objective.mrl_dims))
    total.backward()
    return Outcome(total.item(), gradient_of(model))


class Definition:
    """The loss of one Matryoshka dimension, a query at a time."""

    def __init__(self, name, queries, passages, guide_queries, guide_passages, objective=None):
        self.name, self.objective = name, objective or OBJECTIVES[name]
        self.vectors, self.guides = {"query": queries, "doc": passages}, {"query": guide_queries, "doc": guide_passages}
        self.owner = [g for g, n in enumerate(SIZES) for _ in range(n)]
        self.first = [self.owner.index(g) for g in range(GROUPS)]
        self.keys = [key(p) for group in PASSAGES for p in group]

    def loss(self):
        total = sum(self.query_loss(g) for g in range(GROUPS)) / GROUPS
        if self.objective.distillation == "cosent":
            pairs = [(self.score(self.owner[n], n), t) for n, t in enumerate(np.concatenate(TEACHER).tolist())]
            worse = [torch.exp(b - a) for a, teacher_a in pairs for b, teacher_b in pairs if teacher_a > teacher_b]
            total = total + torch.log(1 + torch.stack(worse).sum())
        return total

    def score(self, g, n):
        return torch.dot(self.vectors["query"][g], self.vectors["doc"][n]) / TEMPERATURE

    def query_loss(self, g):
        objective, own = self.objective, [n for n, o in enumerate(self.owner) if o == g]
        teacher = torch.tensor(TEACHER[g]) / objective.teacher_temperature
        weights, scores = torch.softmax(teacher, 0), torch.stack([self.score(g, n) for n in own])
        label = torch.tensor(labels_of(TEACHER[g])) if objective.distillation == "soft_labels" else None
        targets = {self.first[g]} | (
            {n for n, each in zip(own, label, strict=True) if each} if label is not None else set()
        )
        seen = {direction: self.terms(direction, g, targets) for direction in objective.directions}
        if objective.distillation == "m3_kd_loss":
            seen[Q2D] = None
        sums = [torch.logsumexp(torch.stack(terms), 0) for terms in seen.values() if terms]
        target = scores[0] if label is None else (label / label.sum() * scores).sum()
        if objective.distillation == "m3_kd_loss":
            loss = sum(w * self.m3_term(g, own[i:]) for i, w in enumerate(weights))
            loss = (loss + sums[0] - scores[0]) / 2 if sums else loss
        elif objective.partition_mode == "per_direction":
            loss = (sums[0] - target + sums[1] - scores[0]) / 2
        else:
            loss = torch.logsumexp(torch.cat([torch.stack(terms) for terms in seen.values() if terms]), 0) - target
        loss = objective.contrastive_weight * loss
        if objective.distillation == "kl_div":
            loss = loss - (weights * torch.log_softmax(scores, 0)).sum()
        if objective.distillation == "margin_mse" and len(own) > 1:
            margins = (scores[0] - scores[1:]) * TEMPERATURE - (teacher[0] - teacher[1:])
            loss = loss + (margins**2).mean()
        if objective.distillation == "score_mse":
            loss = loss + ((scores * TEMPERATURE - teacher) ** 2).mean()
        return loss

    def m3_term(self, g, still):
        """Cross-entropy of the first of the own passages that are left, among these and all of other groups."""
        others = [n for n, o in enumerate(self.owner) if o != g and self.is_seen(Q2D, g, n)]
        return torch.logsumexp(torch.stack([self.score(g, n) for n in still + others]), 0) - self.score(g, still[0])

    def is_seen(self, direction, g, n):
        row, column = direction.split("_to_")
        group = self.owner[n] if column == "doc" else n
        if row == column and group == g:
            return False
        positive = self.guides["doc"][self.first[g]]
        row_guide = self.guides["query"][g] if row == "query" else positive
        known = {
            Q2D: lambda: self.keys[n] in KNOWN[g],
            D2D: lambda: self.keys[n] in KNOWN[g],
            D2Q: lambda: self.keys[self.first[g]] in KNOWN[n],
            Q2Q: lambda: key(QUERIES[g]) == key(QUERIES[n]) or bool({*KNOWN[g]} & {*KNOWN[n]}),
        }[direction]()
        limit = cosine(self.guides["query"][g], positive) - (self.objective.margin or 0)
        return compared(
            self.name, self.objective, lambda: cosine(row_guide, self.guides[column][n]), limit, g, group, known
        )

    def terms(self, direction, g, targets):
        """Return the logarithms of the terms of a direction's denominator."""
        row, column = direction.split("_to_")
        vector = self.vectors["query"][g] if row == "query" else self.vectors["doc"][self.first[g]]
        always = {Q2D: targets, D2Q: {g}}.get(direction, set())
        seen = [n for n in range(len(self.vectors[column])) if n in always or self.is_seen(direction, g, n)]
        similarity = [torch.dot(vector, self.vectors[column][n]) for n in seen]
        mode, strength = self.objective.hardness_mode, self.objective.hardness_strength
        if mode is None or direction != Q2D:
            return [s / TEMPERATURE for s in similarity]
        own = [self.owner[n] == g for n in seen]
        hard = [
            n not in targets and (mode == "all_negatives" or is_own == (mode == "hard_negatives"))
            for n, is_own in zip(seen, own, strict=True)
        ]
        weight = [torch.exp(strength * s.detach()) for s in similarity]
        weighted = [w for w, is_hard in zip(weight, hard, strict=True) if is_hard]
        mean = torch.stack(weighted).mean() if weighted and self.objective.hardness_normalize else torch.ones(())
        return [
            s / TEMPERATURE + (torch.log(w / mean) if is_hard else 0)
            for s, w, is_hard in zip(similarity, weight, hard, strict=True)
        ]


# --- W processes ------------------------------------------------------------------------------------------------------


def one_worker(rank: int, shares: tuple[int, ...], folder: str) -> None:
    """Run every objective and way with DistributedDataParallel as in training; rank 0 saves the outcome."""
    torch.set_num_threads(1)
    world = len(shares)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    outcome = {}
    for name, way in itertools.product(OBJECTIVES, SHARES[shares]):
        model = torch.nn.parallel.DistributedDataParallel(model_of(name, way))
        loss = model(batch_of(sum(shares[:rank]), shares[rank], "alone" in name))
        loss.backward()
        mean = loss.detach() / world
        torch.distributed.all_reduce(mean)
        outcome[name, way, shares] = Outcome(mean.item(), gradient_of(model))
    if rank == 0:
        torch.save(outcome, os.path.join(folder, "outcome"))
    torch.distributed.barrier()
    os._exit(0)  # destroying the process group while a DDP model is alive can block forever


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Loss and gradient by (objective, way, shares), from 1, 2 and 3 gloo processes."""
    outcome = {}
    for shares in SHARES:
        folder = str(tmp_path_factory.mktemp(f"world{len(shares)}"))
        run_in_processes(one_worker, (shares, folder), len(shares))
        outcome.update(torch.load(os.path.join(folder, "outcome"), weights_only=False))
    return outcome


@pytest.fixture(scope="module")
def expected():
    """Loss and gradient by objective, from the definitions."""
    return {name: by_definition(name) for name in OBJECTIVES}


@pytest.mark.parametrize(("shares", "way"), [(shares, way) for shares, ways in SHARES.items() for way in ways], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_equal_the_definition(outcomes, expected, name, shares, way):
    """Tolerance 1e-5: fp32 sums in another order; a factor 1/W or W would be off by 0.5 or 1."""
    one, many = expected[name], outcomes[name, way, shares]
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert one.gradient.norm() > 1e-2
    assert (many.gradient - one.gradient).norm() / one.gradient.norm() < 1e-5


def test_objectives_differ(expected):
    """Canary: a mask without effect would pass every comparison above."""
    assert len({round(outcome.loss, 4) for outcome in expected.values()}) == len(expected)


def test_single_worker_gathers_nothing():
    x_BD = torch.randn(3, 2)
    assert gather_counts([3, 5], x_BD.device) == [[3], [5]]
    assert gather_rows(x_BD, [3]) is x_BD
