"""Running a model on tokenized texts: on one device, or copies of it on several devices in parallel.

Letters in tensor names: N texts handed in, B texts in a chunk, D width of a vector.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from raybge.model.embedding import EmbeddingModel, eval_mode, plan_chunks
from raybge.util.errors import UserError

Devices = str | int | Sequence[str | int] | None
_BAR_DELAY = 3.0  # seconds after which a progress bar appears on a terminal


def pick_devices(devices: Devices) -> list[torch.device]:
    """Return the devices, at least one; None selects the GPU if there is one."""
    if devices is None:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    names = [devices] if isinstance(devices, str | int) else list(devices)
    if not names:
        raise UserError('devices: expected one or more, such as "cpu" or ["cuda:0", "cuda:1"], found none')
    return [torch.device(f"cuda:{device}" if isinstance(device, int) else device) for device in names]


def pick_device(devices: Devices) -> torch.device:
    """Return the one device; UserError for several."""
    picked = pick_devices(devices)
    if len(picked) != 1:
        raise UserError(f"devices: this model runs on one device, found {list(map(str, picked))}")
    return picked[0]


def embed_texts(
    copies: Sequence[EmbeddingModel], token_ids: Sequence[np.ndarray], width: int, budget: int, bar: bool | None
) -> Tensor:
    """Compute the vectors of tokenized texts, without gradients or dropout.

    The chunks depend on the texts and the budget alone: several devices of one kind give the same vectors as one.

    Args:
        copies: a model, and copies of it on other devices that share the work.
        token_ids: ids of each of N texts.
        width: leading numbers of each vector to keep; if fewer than all, a model that normalizes scales them to length
            1 again.
        budget: maximal number of tokens in a chunk, with padding; a longer text runs alone.
        bar: show a progress bar; None: on a terminal if it takes long.

    Returns:
        (N, width) fp32 on the CPU.
    """
    e_ND = torch.empty(len(token_ids), width)
    progress = tqdm(
        total=len(token_ids),
        desc="encode",
        unit=" texts",
        dynamic_ncols=True,
        disable=None if bar is None else not bar,  # None: disabled unless on a terminal
        delay=_BAR_DELAY if bar is None else 0,
    )

    def run(model: EmbeddingModel, rows: list[int]) -> None:
        e_BD = model(*model.pad(token_ids, rows))
        if width < model.dim:
            e_BD = e_BD[:, :width]
            e_BD = nn.functional.normalize(e_BD, dim=-1) if model.normalize else e_BD
        # chunk by chunk to the host: all vectors together may not fit into the device's memory next to the model
        e_ND[rows] = e_BD.cpu()
        progress.update(len(rows))

    with progress, contextlib.ExitStack() as stack:
        for model in copies:
            stack.enter_context(eval_mode(model))
        _share_chunks(copies, plan_chunks([len(ids) for ids in token_ids], budget), run)
    return e_ND


def _share_chunks(models: Sequence[EmbeddingModel], chunks: Iterable[Any], run: Callable[[Any, Any], None]) -> None:
    """Call `run(model, chunk)` once for each chunk.

    Several models run in a thread each, since torch releases Python's lock, and take the next chunk when they are free.
    An error in one thread ends all of them and is raised.
    """
    pending = deque(chunks)

    def work(model: EmbeddingModel) -> None:
        device = next(model.parameters()).device
        # both are per thread: whether gradients are recorded, and the current GPU
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            while True:
                try:
                    chunk = pending.popleft()
                except IndexError:
                    return
                try:
                    run(model, chunk)
                except BaseException:
                    pending.clear()
                    raise

    if len(models) == 1:
        work(models[0])
        return
    with ThreadPoolExecutor(len(models)) as threads:
        for future in [threads.submit(work, model) for model in models]:
            future.result()
