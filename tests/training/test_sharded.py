"""A model in shards, as with --fsdp: workers run different numbers of chunks, and evaluate in between.

The Trainer shards on GPUs only; two gloo processes on the CPU do the same here, with accelerate's own wrapping.
"""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from process_runtime import run_in_processes
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForMaskedLM, BertModel, Qwen3Config, Qwen3Model

from raybge.data.masking import MaskedBatch, MaskedText
from raybge.data.step_batch import Groups, StepBatch
from raybge.losses import contrastive_model, retromae
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.losses.retromae import RetroMAE
from raybge.model.embedding import EmbeddingModel
from raybge.training.checkpoint.safe_load import safe_loading
from raybge.training.sharding import call_sharded, layer_classes, prepare_sharding
from raybge.training.weight_averages import WeightEma, held_weights, set_weights
from raybge.util.errors import UserError

SIZE = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def build_model(kind: str = "plain") -> Any:
    torch.manual_seed(0)
    if kind == "pre-training":
        return RetroMAE(BertForMaskedLM(BertConfig(**SIZE, **DROPOUT)), "dupmae")
    if kind == "qwen3":
        backbone: nn.Module = Qwen3Model(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16))
    else:
        backbone = BertModel(BertConfig(**SIZE, **DROPOUT), add_pooling_layer=False)
    model = ContrastiveModel(
        EmbeddingModel(backbone, "mean"), Objective(0.05), None, sub_batch_size=2 if kind == "sub-batches" else None
    )
    if kind == "checkpointing":
        model.gradient_checkpointing_enable()
    return model.train()


SHARES = [(7, 1), (8, 0)]  # groups of each worker in a step
KINDS = ("plain", "sub-batches", "checkpointing", "qwen3", "pre-training")


def build_batch(kind: str, first: int, count: int) -> Any:
    random = np.random.default_rng(3)
    groups = [[random.integers(5, 90, random.integers(2, 15)) for _ in range(3)] for _ in range(8)]
    share = groups[first : first + count]
    texts = [query for query, *_ in share] + [text for _, *passages in share for text in passages]
    rows = [(0, i) for i in range(count)]
    if kind == "pre-training":
        return MaskedBatch(0, rows, [masked(text) for text in texts])
    return StepBatch(0, rows, texts, Groups(np.full(count, 2)))


def masked(token_T: np.ndarray) -> MaskedText:
    """Mask each third token of a text for the encoder; the decoder sees each second one."""
    position_T = np.arange(len(token_T))
    masked_T = position_T % 3 == 1
    visible_RT = position_T[:, None] % 2 == position_T[None] % 2
    return MaskedText(
        token_T=token_T.astype(np.int32),
        ordinary_T=np.ones(len(token_T), bool),
        shown_T=np.where(masked_T, 4, token_T).astype(np.int32),
        masked_T=masked_T,
        visible_RS=np.packbits(visible_RT, axis=1),
        pick_T=position_T.astype(np.uint8),
    )


def shard(model: nn.Module, precision: str = "no", **flags: Any) -> nn.Module:
    """Shard the model on two processes as accelerate does for the Trainer, with our changes to its plugin."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", **flags)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    prepare_sharding(plugin, flags, model.embedding.backbone)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        mixed_precision=precision,
        is_main_process=False,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def start_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    contrastive_model.CPU_TOKENS_PER_CHUNK = retromae.CPU_TOKENS_PER_CHUNK = 16


def step(model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    model(batch).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def evaluate(model: Any, token_ids: list) -> torch.Tensor:
    with torch.no_grad():
        return call_sharded(model, lambda: model.embedding.embed(token_ids, 10_000, min_chunks=1))


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


def weights_of(layer: nn.Module) -> set[type]:
    return {type(parameter) for parameter in layer.parameters()}


def worker(rank: int, folder: str, kind: str, shares: tuple[int, int]) -> None:
    start_worker(rank, folder)
    model: Any = shard(build_model(kind))
    gathered = []
    first, second = next(m for m in model.embedding.backbone.modules() if isinstance(m, nn.ModuleList))
    part = next(module for module in second.modules() if isinstance(module, nn.Linear))
    part.register_forward_hook(lambda *_: gathered.append((weights_of(first), weights_of(second))))
    batch = build_batch(kind, sum(shares[:rank]), shares[rank])
    before = evaluate(model, batch.token_ids)  # before the first step
    finite = [] if kind == "pre-training" else call_sharded(model, lambda: model.finite_groups(batch))
    assert finite == [True] * len(finite)
    for _ in range(2):
        step(model, batch)
    after = evaluate(model, batch.token_ids)
    assert weights_of(model) == {DTensor}
    # While the second layer runs, the first is in shards, except where a backward pass computes a chunk again.
    in_forward = ({DTensor}, {nn.Parameter})
    assert in_forward in gathered, gathered
    assert kind == "sub-batches" or all(each == in_forward for each in gathered), gathered
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    save_and_load(model, folder)
    torch.save((before, after, weights), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_model_trains_and_evaluates_like_an_unsharded_one(tmp_path, kind, shares):
    run_in_processes(worker, (str(tmp_path), kind, shares), 2)
    results = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    model = build_model(kind)
    texts = [build_batch(kind, sum(shares[:rank]), shares[rank]).token_ids for rank in (0, 1)]
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][0], evaluate(model, texts[rank]), atol=1e-5, rtol=1e-4)
    for _ in range(2):
        step(model, build_batch(kind, 0, 8))
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][1], evaluate(model, texts[rank]), atol=1e-5, rtol=1e-4)
        assert results[rank][2].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(results[rank][2][name], value, atol=1e-5, rtol=1e-4)
    assert (results[0][1] - results[0][0]).abs().max() > 1e-2


def average_worker(rank: int, folder: str) -> None:
    """Average the weights of three steps; write the average, read it, and set the model's weights to it."""
    start_worker(rank, folder)
    model: Any = shard(build_model())
    averages = [WeightEma(model, 0.5) for _ in range(2)]
    weights = []
    batch = build_batch("plain", *((0, 7), (7, 1))[rank])
    for number in (1, 2, 3):
        step(model, batch)
        averages[0].update(number)
        weights.append({name: value.full_tensor() for name, value in model.state_dict().items()})
    averages[0].save(folder, rank == 0, lambda action: action())
    torch.distributed.barrier()
    averages[1].load(folder)
    held = held_weights(model)
    set_weights(model, averages[1].held())
    actual = {name: value.full_tensor() for name, value in model.state_dict().items()}
    set_weights(model, held)
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), weights[-1][name])
    torch.save((weights, actual), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)


def test_shards_are_averaged_written_and_read(tmp_path):
    run_in_processes(average_worker, (str(tmp_path),), 2)
    written = torch.load(tmp_path / "ema.pt", weights_only=True)["averages"]
    for rank in (0, 1):
        weights, actual = torch.load(tmp_path / str(rank))
        assert written.keys() <= actual.keys()
        for name, value in actual.items():
            expected = sum(f * each[name].double() for f, each in zip((1, 2, 4), weights, strict=True)) / 7
            torch.testing.assert_close(value, expected.float(), atol=1e-7, rtol=1e-6)
            assert torch.equal(written[name], value)
            assert not name.endswith("weight") or not torch.equal(weights[0][name], weights[2][name])


def half_precision_worker(rank: int, folder: str) -> None:
    """Compute the gradient in bf16 with many chunks."""
    start_worker(rank, folder)
    model = shard(build_model(), "bf16", reshard_after_forward=True)
    shares = SHARES[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(build_batch("plain", sum(shares[:rank]), shares[rank]))
    loss.backward()
    gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    torch.save((loss.dtype, torch.cat([gradient.flatten() for gradient in gradients])), f"{folder}/{rank}")
    torch.distributed.barrier()
    os._exit(0)


def test_half_precision_has_loss_and_sums_in_fp32(tmp_path):
    run_in_processes(half_precision_worker, (str(tmp_path),), 2)
    model = build_model()
    model(build_batch("plain", 0, 8)).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for rank in (0, 1):
        dtype, gradient = torch.load(tmp_path / str(rank))
        assert dtype == gradient.dtype == torch.float32
        assert 1e-4 < (gradient - exact).norm() / exact.norm() < 0.03


def test_options_of_the_user_stay():
    plugin = SimpleNamespace(mixed_precision_policy="bf16", transformer_cls_names_to_wrap=["BertAttention"])
    prepare_sharding(plugin, {"mixed_precision_policy": "bf16"}, build_model().embedding.backbone)
    assert vars(plugin) == {"mixed_precision_policy": "bf16", "transformer_cls_names_to_wrap": ["BertAttention"]}
    plugin.transformer_cls_names_to_wrap = ["BertLayr"]
    with pytest.raises(UserError, match="this model has no BertLayr; its layers are BertLayer"):
        prepare_sharding(plugin, {}, build_model().embedding.backbone)


def test_layers_are_the_members_of_the_outermost_lists():
    assert layer_classes(build_model().embedding.backbone) == {"BertLayer"}
    assert layer_classes(build_model("qwen3").embedding.backbone) == {"Qwen3DecoderLayer"}
    size = dict(embedding_size=16, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    assert layer_classes(AlbertModel(AlbertConfig(**size))) == {"AlbertLayerGroup"}  # a list of layers within
    assert layer_classes(nn.Linear(1, 1)) == set()
