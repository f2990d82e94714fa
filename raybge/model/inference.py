"""Running a model on tokenized texts: on one device, or copies of it on several side by side.

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
_LONG = 3.0  # seconds after which a terminal gets a progress bar


def pick_devices(devices: Devices) -> list[torch.device]:
    """The devices that are meant, at least one; None takes the GPU if there is one."""
    if devices is None:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    named = [devices] if isinstance(devices, str | int) else list(devices)
    if not named:
        raise UserError('devices: expected one or more, such as "cpu" or ["cuda:0", "cuda:1"], found none')
    return [torch.device(f"cuda:{device}" if isinstance(device, int) else device) for device in named]


def pick_device(devices: Devices) -> torch.device:
    """The one device that is meant. UserError for several."""
    found = pick_devices(devices)
    if len(found) != 1:
        raise UserError(f"a model here holds one device, found {list(map(str, found))}")
    return found[0]


def embed_texts(
    copies: Sequence[EmbeddingModel], token_ids: Sequence[np.ndarray], width: int, budget: int, bar: bool | None
) -> Tensor:
    """The vectors of tokenized texts, without gradients or dropout.

    What is computed together follows from the texts and the budget alone: devices of one kind give
    what one gives.

    Args:
        copies: a model, and copies of it on other devices that share the work.
        token_ids: of each of N texts.
        width: the first so many numbers of each vector are kept; fewer than all are brought to length 1 again where the
            model normalises.
        budget: the most tokens, padding counted, of one chunk; a longer text runs alone.
        bar: show a progress bar; None: on a terminal, when it takes long.

    Returns:
        (N, width) fp32 on the CPU.
    """
    e_ND = torch.empty(len(token_ids), width)
    shown = tqdm(
        total=len(token_ids),
        desc="encode",
        unit=" texts",
        dynamic_ncols=True,
        disable=None if bar is None else not bar,  # None: unless on a terminal
        delay=_LONG if bar is None else 0,
    )

    def run(model: EmbeddingModel, rows: list[int]) -> None:
        e_BD = model(*model.pad(token_ids, rows))
        if width < model.dim:
            e_BD = e_BD[:, :width]
            e_BD = nn.functional.normalize(e_BD, dim=-1) if model.normalize else e_BD
        # chunk by chunk to the host: all vectors together may not fit beside the model
        e_ND[rows] = e_BD.cpu()
        shown.update(len(rows))

    with shown, contextlib.ExitStack() as stack:
        for model in copies:
            stack.enter_context(eval_mode(model))
        _deal(copies, plan_chunks([len(ids) for ids in token_ids], budget), run)
    return e_ND


def _deal(models: Sequence[EmbeddingModel], chunks: Iterable[Any], run: Callable[[Any, Any], None]) -> None:
    """Call `run(model, chunk)` once for each chunk. Of several models each is in a thread of its own and takes the next
    chunk when it is free: a model's work releases Python's lock. An error in one ends all, and is raised.
    """
    waiting = deque(chunks)

    def work(model: EmbeddingModel) -> None:
        device = next(model.parameters()).device
        # both are a thread's own: gradients on or off, and the GPU that kernels take for theirs
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            while True:
                try:
                    chunk = waiting.popleft()
                except IndexError:
                    return
                try:
                    run(model, chunk)
                except BaseException:
                    waiting.clear()
                    raise

    if len(models) == 1:
        work(models[0])
        return
    with ThreadPoolExecutor(len(models)) as threads:
        for done in [threads.submit(work, model) for model in models]:
            done.result()
