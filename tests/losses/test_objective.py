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
from raybge.losses.objective import Objective, gather_counts, gather_rows
from raybge.model.embedding import SUB_BATCH_MULTIPLE, EmbeddingModel

GROUPS = 8
TEMPERATURE = 0.05
BLOCK = 3
PLAIN = Objective(TEMPERATURE, mask_known=False)
OBJECTIVES = {
    "cross-worker": PLAIN,
    "blocks": replace(PLAIN, cross_device=False, block=BLOCK),
    "no in-batch": replace(PLAIN, in_batch=False),
    "bidirectional": replace(PLAIN, bidirectional=True),
    "Matryoshka": replace(PLAIN, mrl_dims=(8, 32)),
    "kl_div": replace(PLAIN, distillation="kl_div"),
    "m3_kd_loss": replace(PLAIN, distillation="m3_kd_loss"),
    "m3_kd_loss, no in-batch": replace(PLAIN, distillation="m3_kd_loss", in_batch=False),
    "known masked": replace(PLAIN, mask_known=True),
    "known masked, bidirectional": replace(PLAIN, mask_known=True, bidirectional=True),
    "margin": replace(PLAIN, margin=0.05),
    "margin by guide": replace(PLAIN, margin=0.05),
    "margin by guide, bidirectional": replace(PLAIN, margin=0.05, bidirectional=True),
    "alone": PLAIN,
    "everything": replace(
        PLAIN, mask_known=True, margin=0.05, bidirectional=True, mrl_dims=(8, 32), distillation="kl_div"
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


def visible(name, objective, q, target, texts, groups, known_of, guide_q, guide_texts, row_key=None):
    """Return True for each of `texts` that group q's text is compared with; `known_of` are keys that hide a text."""
    limit = cosine(guide_q, guide_texts[target]) - objective.margin if objective.margin is not None else None
    seen = []
    for n, group in enumerate(groups):
        ok = objective.in_batch or group == q
        ok &= objective.cross_device or group // BLOCK == q // BLOCK
        ok &= name != "alone" or not ALONE[q] or group == q
        ok &= not (objective.mask_known and known_of(n))
        ok &= limit is None or bool(cosine(guide_q, guide_texts[n]) <= limit)
        seen.append(ok or n == target)
    return seen


def cross_entropy(query, texts, target, seen):
    scores = torch.stack([torch.dot(query, p) / TEMPERATURE for p, ok in zip(texts, seen, strict=True) if ok])
    return torch.logsumexp(scores, 0) - torch.dot(query, texts[target]) / TEMPERATURE


def by_definition(name: str) -> Outcome:
    """Loss and gradient from embeddings computed one text at a time."""
    objective = OBJECTIVES[name]
    model = embedding_of(0)
    guide = embedding_of(1) if "guide" in name else model
    flat = [p for group in PASSAGES for p in group]
    owner = [g for g, n in enumerate(SIZES) for _ in range(n)]
    first = [owner.index(g) for g in range(GROUPS)]
    with torch.no_grad():
        guide_q = [guide.embed([ids], 64)[0] for ids in QUERIES]
        guide_p = [guide.embed([ids], 64)[0] for ids in flat]
    total = torch.zeros(())
    full_q = [model.embed([ids], 64)[0] for ids in QUERIES]
    full_p = [model.embed([ids], 64)[0] for ids in flat]
    for dim in objective.mrl_dims or (32,):
        queries = [v[:dim] / v[:dim].norm() for v in full_q]
        passages = [v[:dim] / v[:dim].norm() for v in full_p]
        for g, q in enumerate(queries):
            own = [n for n, o in enumerate(owner) if o == g]
            seen = visible(
                name,
                objective,
                g,
                first[g],
                passages,
                owner,
                lambda n, g=g: key(flat[n]) in KNOWN[g],
                guide_q[g],
                guide_p,
            )
            loss = cross_entropy(q, passages, first[g], seen)
            weights = torch.softmax(torch.tensor(TEACHER[g]), 0)
            if objective.distillation == "m3_kd_loss":
                loss = torch.zeros(())
                for i, n in enumerate(own):
                    still = [ok and m not in own[:i] for m, ok in enumerate(seen)]
                    loss = loss + weights[i] * cross_entropy(q, passages, n, still)
            if objective.bidirectional:
                back = visible(
                    name,
                    objective,
                    g,
                    g,
                    queries,
                    range(GROUPS),
                    lambda j, g=g: key(PASSAGES[g][0]) in KNOWN[j],
                    guide_p[first[g]],
                    guide_q,
                )
                loss = (loss + cross_entropy(passages[first[g]], queries, g, back)) / 2
            if objective.distillation == "kl_div":
                student = torch.log_softmax(torch.stack([torch.dot(q, passages[n]) for n in own]) / TEMPERATURE, 0)
                loss = loss - (weights * student).sum()
            total = total + loss
    total = total / GROUPS / max(1, len(objective.mrl_dims))
    total.backward()
    return Outcome(total.item(), gradient_of(model))


# --- W processes ------------------------------------------------------------------------------------------------------


def one_worker(rank: int, shares: tuple[int, ...], folder: str) -> None:
    """Run every objective and way with DistributedDataParallel as in training; rank 0 saves the outcome."""
    torch.set_num_threads(1)
    world = len(shares)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    outcome = {}
    for name, way in itertools.product(OBJECTIVES, SHARES[shares]):
        model = torch.nn.parallel.DistributedDataParallel(model_of(name, way))
        loss = model(batch_of(sum(shares[:rank]), shares[rank], name == "alone"))
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


# --- sub-batches under dropout ----------------------------------------------------------------------------------------


def test_sub_batches_replay_dropout():
    """Against the same chunks with their graphs held: the gradient is equal only if each dropout mask is repeated."""

    def gradient(recompute: bool, dropout: float) -> torch.Tensor:
        model = model_of("cross-worker", "sub-batched").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        if not recompute:
            model.sub_batch_size = None
            chunks = model.embedding.embed
            model.embedding.embed = lambda ids, tokens, multiple, *_: torch.cat(  # the same chunks of 3, sorted
                [chunks([ids[i] for i in rows], tokens, SUB_BATCH_MULTIPLE) for rows in by_length(ids, 3)]
            )[position_of(ids, 3)]
        torch.manual_seed(3)
        model(batch_of(0, GROUPS, alone=False)).backward()
        return gradient_of(model)

    reference, again = gradient(False, 0.3), gradient(True, 0.3)
    assert (reference - again).norm() / reference.norm() < 1e-6
    assert (gradient(True, 0.0) - again).norm() / again.norm() > 0.1  # dropout was on


def by_length(ids, size):
    rows = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def position_of(ids, size):
    rows = [row for chunk in by_length(ids, size) for row in chunk]
    return torch.tensor(rows).argsort()


def test_sub_batches_hold_no_activations():
    """Bytes that autograd holds after the forward pass grow with the batch by the vectors alone."""

    def held(sub_batch_size: int | None, sub_batch_tokens: int | None = None) -> int:
        model = model_of("cross-worker")
        model.sub_batch_size, model.sub_batch_tokens = sub_batch_size, sub_batch_tokens
        held = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch_of(0, GROUPS, alone=False))
        return held

    assert held(2) < held(None) / 10
    assert held(None, 40) < held(None) / 10


def test_single_worker_gathers_nothing():
    x_BD = torch.randn(3, 2)
    assert gather_counts([3, 5], x_BD.device) == [[3], [5]]
    assert gather_rows(x_BD, [3]) is x_BD
