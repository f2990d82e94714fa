"""The gradient of W processes against that of one process with the whole batch, and against plain loops."""

import itertools
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from transformers import BertConfig, BertModel

from raybge.data.collate import StepBatch
from raybge.model.contrastive import ContrastiveModel
from raybge.model.embedding import EmbeddingModel
from raybge.model.negatives import Objective, gather_counts, gather_rows

GROUPS = 8
TEMPERATURE = 0.05
OBJECTIVES = {
    "cross-worker": Objective(TEMPERATURE),
    "blocks": Objective(TEMPERATURE, cross_device=False, block=3),
    "no in-batch": Objective(TEMPERATURE, in_batch=False),
}
# Groups of each worker. Blocks of 3 straddle the workers in every one of them.
SHARES = {
    1: [(8,)],
    2: [(4, 4), (5, 3), (8, 0)],
    3: [(3, 3, 2), (0, 7, 1)],
}


@dataclass
class Outcome:
    loss: float
    gradient: torch.Tensor


def batch_of(first: int, count: int) -> StepBatch:
    """Groups [first, first + count) of one fixed global batch: ragged texts, one to three passages a group."""
    random = np.random.default_rng(7)
    sizes = [3, 1, 2, 3, 3, 2, 1, 3]
    queries = [random.integers(5, 90, random.integers(2, 9)) for _ in range(GROUPS)]
    passages = [[random.integers(5, 90, random.integers(2, 15)) for _ in range(n)] for n in sizes]
    held = range(first, first + count)
    return StepBatch(
        step=0,
        rows=[(0, i) for i in held],
        token_ids=[queries[i] for i in held] + [p for i in held for p in passages[i]],
        passages_B=np.array([sizes[i] for i in held], dtype=np.int64),
    )


def model_of(objective: Objective) -> ContrastiveModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ContrastiveModel(EmbeddingModel(BertModel(config), "mean", True), objective, None)


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def one_worker(rank: int, world: int, folder: str) -> None:
    """Every objective and share, through DistributedDataParallel as in training; rank 0 keeps loss and gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for (name, objective), shares in itertools.product(OBJECTIVES.items(), SHARES[world]):
        model = torch.nn.parallel.DistributedDataParallel(model_of(objective))
        loss = model(batch_of(sum(shares[:rank]), shares[rank]))
        loss.backward()
        mean = loss.detach() / world
        torch.distributed.all_reduce(mean)
        found[name, shares] = Outcome(mean.item(), gradient_of(model))
    if rank == 0:
        torch.save(found, os.path.join(folder, "found"))
    torch.distributed.barrier()
    os._exit(0)  # taking gloo apart with a DDP model still alive can wait for ever


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Loss and gradient by (objective, shares), from 2 and from 3 gloo processes."""
    found = {}
    for world in (2, 3):
        folder = str(tmp_path_factory.mktemp(f"world{world}"))
        mp.spawn(one_worker, (world, folder), nprocs=world)
        found.update(torch.load(os.path.join(folder, "found"), weights_only=False))
    return found


def alone(objective: Objective) -> Outcome:
    model = model_of(objective)
    loss = model(batch_of(0, GROUPS))
    loss.backward()
    return Outcome(loss.item(), gradient_of(model))


@pytest.mark.parametrize("shares", [*SHARES[2], *SHARES[3]], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_workers_give_the_gradient_of_one_process(outcomes, name, shares):
    """fp32 sums in another order: 1e-5 leaves room for that and nothing else (1/W or W would be off by 0.5 or 1)."""
    one, many = alone(OBJECTIVES[name]), outcomes[name, shares]
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert one.gradient.norm() > 1e-2
    assert (many.gradient - one.gradient).norm() / one.gradient.norm() < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_process_follows_the_definition(name):
    """Each query against the passages it may see, one at a time, from embeddings made one text at a time."""
    objective = OBJECTIVES[name]
    model = model_of(objective).eval()
    batch = batch_of(0, GROUPS)
    vectors = [model.embedding.embed([ids], 64)[0] for ids in batch.token_ids]
    queries, passages = vectors[:GROUPS], vectors[GROUPS:]
    owner = [g for g, n in enumerate(batch.passages_B) for _ in range(n)]
    losses = []
    for g, q in enumerate(queries):
        same_block = [o // 3 == g // 3 for o in owner]
        own = [o == g for o in owner]
        sees = {"cross-worker": [True] * len(owner), "blocks": same_block, "no in-batch": own}[name]
        scores = torch.stack([q @ p / TEMPERATURE for p, seen in zip(passages, sees, strict=True) if seen])
        losses.append(torch.logsumexp(scores, 0) - q @ passages[owner.index(g)] / TEMPERATURE)
    assert alone(objective).loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_objectives_differ():
    """A mask that does nothing would pass every comparison above."""
    losses = [alone(objective).loss for objective in OBJECTIVES.values()]
    assert len({round(loss, 3) for loss in losses}) == len(losses)


def test_alone_gathers_nothing():
    x_BD = torch.randn(3, 2)
    assert gather_counts(3, x_BD.device) == [3]
    assert gather_rows(x_BD, [3]) is x_BD
