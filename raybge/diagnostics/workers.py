"""Gradients of several processes, by NCCL with a GPU each or by gloo on a CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from raybge.data.step_batch import StepBatch
from raybge.diagnostics.samples import GROUPS, build_batch, build_model, gradient


def shares_of(world: int) -> list[int]:
    """Return groups of each worker: uneven, and none for the first of three or more."""
    if world == 1:
        return [GROUPS]
    busy = world if world < 3 else world - 1
    shares = [GROUPS // busy] * busy
    shares[-1] += GROUPS - sum(shares)
    shares[0], shares[-1] = shares[0] - 1, shares[-1] + 1
    return shares if world < 3 else [0, *shares]


def gradients_of_workers(world: int, device_type: str) -> dict[tuple[str, torch.dtype], Tensor]:
    """Compute the gradient of one global batch with several processes.

    Args:
        world: number of processes.
        device_type: "cuda", where each process has a GPU, or "cpu".

    Returns:
        The gradient on the CPU by ("DDP" or "FSDP", precision), fp32 and under bf16 autocast.
    """
    with tempfile.TemporaryDirectory(prefix="raybge-selftest-") as folder:
        mp.spawn(_run, (shares_of(world), device_type, folder), nprocs=world)
        path = os.path.join(folder, "gradients")
        gradients: dict[tuple[str, torch.dtype], Tensor] = torch.load(path, map_location="cpu")
    return gradients


def _run(rank: int, shares: Sequence[int], device_type: str, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
    batch = build_batch(sum(shares[:rank]), shares[rank])
    gradients = {
        (name, precision): _gradient(wrap(build_model(device, sub_batch_size=5), device_type), batch, precision)
        for name, wrap in (("DDP", _data_parallel), ("FSDP", _sharded))
        for precision in (torch.float32, torch.bfloat16)
    }
    if rank == 0:
        torch.save(gradients, os.path.join(folder, "gradients"))
    dist.barrier()
    dist.destroy_process_group()  # all models are gone: with one alive it could block for ever


def _gradient(model: nn.Module, batch: StepBatch, precision: torch.dtype) -> Tensor:
    return gradient(model, batch, None if precision == torch.float32 else precision)


def _data_parallel(model: nn.Module, device_type: str) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _sharded(model: nn.Module, device_type: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    wrapped: nn.Module = fully_shard(model, mesh=mesh)
    return wrapped
