"""The gradient of W processes in half precision against one in fp32, with sub-batches, uneven and empty shares."""

import os

import pytest
import torch
from process_runtime import run_in_processes
from test_objective import GROUPS, batch_of, gradient_of, model_of

SHARES = [(8,), (5, 3), (0, 6, 2)]  # groups of each worker
# Relative error of the gradient, which has 8 significant bits in bf16 and 11 in fp16. A share that is scaled by 1/W or
# W would be off by 0.5 or more.
LIMITS = {torch.bfloat16: 0.04, torch.float16: 0.005}
WAYS = ("plain", "sub-batched")
SCALE = 2.0**12


def step(model: torch.nn.Module, first: int, count: int, precision: torch.dtype) -> torch.Tensor:
    """Return the gradient of a step as transformers' Trainer runs it: autocast, and in fp16 a scaled loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", precision):
        loss = model(batch_of(first, count, alone=False))
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return gradient_of(model)


def one_worker(rank: int, shares: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    world = len(shares)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    gradients = {}
    for way in WAYS:
        for precision in LIMITS:
            model = torch.nn.parallel.DistributedDataParallel(model_of("bidirectional", way))
            gradients[way, precision] = step(model, sum(shares[:rank]), shares[rank], precision)
    if rank == 0:
        torch.save(gradients, os.path.join(folder, "gradients"))
    torch.distributed.barrier()
    os._exit(0)  # destroying the process group while a DDP model is alive can block forever


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_workers_have_the_gradient_of_one_process(tmp_path, shares):
    run_in_processes(one_worker, (shares, str(tmp_path)), len(shares))
    gradients = torch.load(tmp_path / "gradients")
    model = model_of("bidirectional")
    model(batch_of(0, GROUPS, alone=False)).backward()
    exact = gradient_of(model)
    for (way, precision), gradient in gradients.items():
        error = float((gradient - exact).norm() / exact.norm())
        assert 1e-5 < error < LIMITS[precision], (way, precision)
