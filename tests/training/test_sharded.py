"""A model in shards, as with --fsdp: workers run different numbers of chunks, and evaluate in between.

The Trainer shards on GPUs only; two gloo processes on the CPU do the same here.
"""

import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from process_runtime import run_in_processes
from torch import nn
from transformers import BertConfig, BertModel

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses import contrastive_model
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model.embedding import EmbeddingModel
from raybge.training.checkpoint.safe_load import safe_loading
from raybge.training.sharding import keep_weights_in_fp32, unsharded

SHARES = (7, 1)  # groups of each worker in a step


def build_model() -> ContrastiveModel:
    torch.manual_seed(0)
    size = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return ContrastiveModel(EmbeddingModel(BertModel(config, add_pooling_layer=False), "mean"), Objective(0.05), None)


def build_batch(first: int, count: int) -> StepBatch:
    random = np.random.default_rng(3)
    groups = [[random.integers(5, 90, random.integers(2, 15)) for _ in range(3)] for _ in range(sum(SHARES))]
    share = groups[first : first + count]
    texts = [query for query, *_ in share] + [text for _, *passages in share for text in passages]
    return StepBatch(0, [(0, i) for i in range(count)], texts, Groups(np.full(count, 2)))


def step(model: nn.Module, batch: StepBatch) -> None:
    model.zero_grad()
    model(batch).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def save_and_load(model: nn.Module, folder: str) -> None:
    """Save and load shards as accelerate does, and check that the values are equal."""
    shards = f"{folder}/checkpoint-2/pytorch_model_fsdp_0"
    state = {"model": model.state_dict()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(shards))
    empty = {"model": {name: torch.zeros_like(value) for name, value in state["model"].items()}}
    with safe_loading(f"{folder}/checkpoint-2", "weights"):
        dcp.load(empty, storage_reader=dcp.FileSystemReader(shards))
    for name, value in state["model"].items():
        assert torch.equal(empty["model"][name].to_local(), value.to_local())


def worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    contrastive_model.CPU_TOKENS_PER_CHUNK = 16
    model = fully_shard(build_model(), mesh=init_device_mesh("cpu", (2,)))
    batch = build_batch(sum(SHARES[:rank]), SHARES[rank])
    with unsharded(model):  # the evaluation before the first step
        before = model.embedding.embed(batch.token_ids, 16).detach()
    for _ in range(2):
        step(model, batch)
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    with unsharded(model):
        after = model.embedding.embed(batch.token_ids, 16).detach()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    save_and_load(model, folder)
    torch.save((before, after, weights), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)


def half_precision_worker(rank: int, folder: str) -> None:
    """Compute the gradient in bf16 with many chunks, sharded by the policy of accelerate's plugin after our change."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    contrastive_model.CPU_TOKENS_PER_CHUNK = 16
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # accelerate's choice
    keep_weights_in_fp32(plugin, {"reshard_after_forward": True})
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()  # as accelerate reads it
    model = fully_shard(build_model(), mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(build_batch(sum(SHARES[:rank]), SHARES[rank]))
    loss.backward()
    gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    torch.save((loss.dtype, torch.cat([gradient.flatten() for gradient in gradients])), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)


def test_half_precision_has_loss_and_sums_in_fp32(tmp_path):
    run_in_processes(half_precision_worker, (str(tmp_path),), 2)
    model = build_model()
    model(build_batch(0, sum(SHARES))).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for rank in (0, 1):
        dtype, gradient = torch.load(tmp_path / str(rank))
        assert dtype == gradient.dtype == torch.float32
        assert 1e-4 < (gradient - exact).norm() / exact.norm() < 0.03


def test_a_policy_of_the_user_stays():
    plugin = SimpleNamespace(mixed_precision_policy="bf16")
    keep_weights_in_fp32(plugin, {"mixed_precision_policy": "bf16"})
    assert plugin.mixed_precision_policy == "bf16"


def test_sharded_model_trains_and_evaluates_like_an_unsharded_one(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    results = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    model = build_model()
    texts = [build_batch(sum(SHARES[:rank]), SHARES[rank]).token_ids for rank in (0, 1)]
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][0], model.embedding.embed(texts[rank], 16))
    for _ in range(2):
        step(model, build_batch(0, sum(SHARES)))
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][1], model.embedding.embed(texts[rank], 16), atol=1e-5, rtol=1e-4)
        assert results[rank][2].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(results[rank][2][name], value, atol=1e-5, rtol=1e-4)
    assert (results[0][1] - results[0][0]).abs().max() > 1e-2
