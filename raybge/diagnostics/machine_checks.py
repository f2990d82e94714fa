"""The checks of `raybge.selftest`, in the order in which they run.

A check returns what it measured, raises `CheckFailedError` if that is wrong, and `NeedsGpuError` where there is nothing
to check without a GPU. Relative errors compare gradients by the norm of their difference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from raybge.diagnostics.samples import (
    FAMILIES,
    GROUPS,
    build_batch,
    build_embedding,
    build_model,
    distance,
    gradient,
    plain_gradient,
)
from raybge.diagnostics.workers import gradients_of_workers, shares_of
from raybge.losses.functional import softmax_terms
from raybge.model.lora import Lora
from raybge.model.packing import packing_failure, prepare_for_inference

# Relative errors of a gradient against fp32: 8 significant bits in bf16, 11 in fp16.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
MUST_PACK = ("bert", "roberta", "qwen3", "llama")  # other families have attention that the kernels do not compute
MANY = 100  # texts of a gradient that is computed text by text


class CheckFailedError(Exception):
    """Error of a check that measured a wrong value."""


class NeedsGpuError(Exception):
    """There is nothing to check without a GPU."""


def gradient_of_the_loss(device: torch.device) -> str:
    """Compare the gradient of the contrastive loss with that of torch's own, one text at a time, in fp32."""
    return _within(distance(gradient(build_model(device), build_batch()), plain_gradient(device)), torch.float32)


def gradient_in_bf16(device: torch.device) -> str:
    """Compare the gradient under bf16 autocast with fp32."""
    return _gradient_in(torch.bfloat16, device)


def gradient_in_fp16(device: torch.device) -> str:
    """Compare the gradient under fp16 autocast, with a scaled loss, with fp32."""
    return _gradient_in(torch.float16, device)


def sums_over_sub_batches(device: torch.device) -> str:
    """Compare bf16 gradients that are summed over many sub-batches with those of one, both against fp32."""
    model = build_embedding("bert", device)
    texts = [np.random.default_rng(i).integers(5, 900, 8) for i in range(MANY)]

    def computed(precision: torch.dtype | None, sub_batch_size: int | None) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            e_ND = model.embed(texts, 1 << 20, None, sub_batch_size)
        (e_ND @ torch.linspace(-1, 1, model.dim, device=device)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None and p.dim() == 2])

    exact = computed(None, None)
    one, many = (distance(computed(torch.bfloat16, size), exact) for size in (None, 1))
    result = f"relative error {one:.2%} in one sub-batch, {many:.2%} in {MANY}"
    if many > 2 * one:
        raise CheckFailedError(result)
    return result


def scores_with_tf32(device: torch.device) -> str:
    """Compare the scores of the loss, with --tf32, with float64."""
    generator = torch.Generator().manual_seed(0)
    q_BD, p_ND = (torch.nn.functional.normalize(torch.randn(n, 256, generator=generator)) for n in (64, 2048))
    exact_BN = q_BD.double() @ p_ND.double().T / 0.01
    exact_B = torch.logsumexp(exact_BN, 1) - exact_BN.diagonal()
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        loss_B, _ = softmax_terms(
            q_BD.to(device), p_ND.to(device), torch.arange(64, device=device)[:, None], None, 0.01
        )
    finally:
        torch.backends.fp32_precision = before
    error = float((loss_B.cpu() - exact_B).abs().max())
    result = f"largest error of a loss {error:.1e}"
    if error > 1e-3:
        raise CheckFailedError(result)
    return result


def packed_texts(device: torch.device) -> str:
    """Compare vectors and gradients of packed texts with those of padded ones for each model family, fp32 and bf16.

    Of models that are not trained, vectors in fp16.
    """
    if device.type != "cuda":
        raise NeedsGpuError("a CPU trains on padded texts")
    packs, failures = [], []
    for family in FAMILIES:
        reason = None
        for precision in (None, torch.bfloat16):
            reason = reason or packing_failure(build_embedding(family, device, dropout=0.1), precision, None)
        reason = reason or prepare_for_inference(build_embedding(family, device, dropout=0.0).half())
        packs += [family] * (reason is None)
        failures += [f"{family}: {reason}"] * (reason is not None and family in MUST_PACK)
    result = f"{', '.join(packs)} are packed, other families padded"
    if failures:
        raise CheckFailedError(f"{result}; {'; '.join(failures)}")
    return result


def ways_to_save_memory(device: torch.device) -> str:
    """Compare sub-batches and activation checkpointing, each in its own way computed twice, with a plain step."""
    plain = gradient(build_model(device), build_batch())
    checkpointed = build_model(device)
    checkpointed.gradient_checkpointing_enable()
    ways = {"sub-batches": build_model(device, 5), "checkpointing": checkpointed}
    errors = {name: distance(gradient(model, build_batch()), plain) for name, model in ways.items()}
    if device.type == "cuda":
        for family in ("bert", "qwen3"):
            model = build_embedding(family, device, dropout=0.1)
            model.backbone.activation_checkpointing_enable()
            if reason := packing_failure(model, torch.bfloat16, 3):
                raise CheckFailedError(f"{family} on packed texts: {reason}")
    worst = max(errors, key=lambda name: errors[name])
    return f"{', '.join(ways)}: {_within(errors[worst], torch.float32)}"


def adapters_with_checkpointing(device: torch.device) -> str:
    """Run a step of a Qwen3 with adapters and checkpointing; its gradient equals that without checkpointing."""
    if importlib.util.find_spec("peft") is None:
        return "not checked: peft is not installed"
    gradients = []
    for checkpoints in (False, True):
        model = build_embedding("qwen3", device)
        Lora(4, 8, 0.0).apply(model.backbone)
        with torch.no_grad():  # a new adapter's second factor is zero, and with it the first one's gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        model.to(device)
        if checkpoints:
            model.backbone.activation_checkpointing_enable()
            if device.type == "cuda" and (reason := packing_failure(model, torch.bfloat16, None)):
                raise CheckFailedError(reason)
        texts = build_batch().token_ids
        model.embed(texts, 1 << 20).square()[:, ::2].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return _within(distance(*gradients), torch.float32)


def dropout_of_sub_batches(device: torch.device) -> str:
    """Compare one sub-batch, computed twice, with a plain step under the same dropout."""
    gradients = []
    for sub_batch_size in (None, 10_000):
        model = build_model(device, sub_batch_size, dropout=0.2)
        model.pad_to_multiple_of = 16
        torch.manual_seed(1)
        gradients.append(gradient(model, build_batch()))
    return _within(distance(*gradients), torch.float32)


def workers(device: torch.device) -> str:
    """Compare the gradients of several processes with that of one: DDP and FSDP, uneven and empty shares."""
    on_gpu = device.type == "cuda"
    worlds = sorted({1, torch.cuda.device_count()}) if on_gpu else [2, 3]
    exact = gradient(build_model(torch.device("cpu")), build_batch())
    worst: dict[torch.dtype, float] = {}
    for world in worlds:
        for (wrapper, precision), result in gradients_of_workers(world, device.type).items():
            error = distance(result, exact)
            worst[precision] = max(worst.get(precision, 0.0), error)
            if not error <= LIMITS[precision]:
                name = f"{wrapper} on {world} workers with {shares_of(world)} groups"
                raise CheckFailedError(f"{name}: relative error {error:.1e} in {_name(precision)}")
    errors = ", ".join(f"{error:.1e} in {_name(precision)}" for precision, error in worst.items())
    backend = "NCCL" if on_gpu else "gloo"
    return f"{backend}, {' and '.join(map(str, worlds))} workers of {GROUPS} groups, relative error {errors}"


def search(device: torch.device) -> str:
    """Compare the neighbors that faiss finds with NumPy's."""
    if importlib.util.find_spec("faiss") is None:
        return "not checked: faiss is not installed"
    import faiss

    random = np.random.default_rng(0)
    q_QD, p_ND = (random.standard_normal((n, 64), dtype=np.float32) for n in (50, 5000))
    index: Any = faiss.IndexFlatIP(64)
    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    if gpus:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(p_ND)
    _, found_QK = index.search(q_QD, 10)
    share = float(np.mean(found_QK == np.argsort(-(q_QD @ p_ND.T), axis=1, kind="stable")[:, :10]))
    result = f"{share:.1%} of 500 neighbors are NumPy's, on {'a GPU' if gpus else 'the CPU'}"
    if share < 0.99:
        raise CheckFailedError(result)
    return result


CHECKS: tuple[Callable[[torch.device], str], ...] = (
    gradient_of_the_loss,
    gradient_in_bf16,
    gradient_in_fp16,
    sums_over_sub_batches,
    scores_with_tf32,
    packed_texts,
    ways_to_save_memory,
    adapters_with_checkpointing,
    dropout_of_sub_batches,
    workers,
    search,
)


def _gradient_in(precision: torch.dtype, device: torch.device) -> str:
    exact = gradient(build_model(device), build_batch())
    return _within(distance(gradient(build_model(device), build_batch(), precision), exact), precision)


def _within(error: float, precision: torch.dtype) -> str:
    result = f"relative error {error:.1e}"
    if not error <= LIMITS[precision]:  # or not a number
        raise CheckFailedError(f"{result}, at most {LIMITS[precision]:g} is expected in {_name(precision)}")
    return result


def _name(precision: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision]
