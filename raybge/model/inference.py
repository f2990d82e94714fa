"""Running a model on tokenized texts: on one device, or copies of it on several devices in parallel.

Letters in tensor names: N texts handed in, B texts in a chunk, D width of a vector.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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
    copies: Sequence[EmbeddingModel],
    token_groups: Iterable[Sequence[np.ndarray]],
    texts: int,
    longest: int,
    width: int,
    budget: int,
    bar: bool | None,
) -> Tensor:
    """Compute the vectors of tokenized texts, without gradients or dropout.

    The chunks depend on the texts and the budget alone: several devices of one kind give the same vectors as one, and
    so do other groups of the same texts.

    Args:
        copies: a model, and copies of it on other devices that share the work.
        token_groups: ids of each of N texts, in groups.
        texts: number of texts, N.
        longest: tokens of the longest text that there may be.
        width: leading numbers of each vector to keep; if fewer than all, a model that normalizes scales them to length
            1 again.
        budget: maximal number of tokens in a chunk, with padding; a longer text runs alone.
        bar: show a progress bar; None: on a terminal if it takes long.

    Returns:
        (N, width) fp32 on the CPU.
    """
    e_ND = torch.empty(texts, width)
    progress = tqdm(
        total=texts,
        desc="encode",
        unit=" texts",
        dynamic_ncols=True,
        disable=None if bar is None else not bar,  # None: disabled unless on a terminal
        delay=_BAR_DELAY if bar is None else 0,
    )

    def run(model: EmbeddingModel, token_ids: list[np.ndarray]) -> Tensor:
        e_BD = model.embed_chunk(token_ids)
        if width < model.dim:
            e_BD = e_BD[:, :width]
            e_BD = nn.functional.normalize(e_BD, dim=-1) if model.normalize else e_BD
        return e_BD

    def store(rows: list[int], e_BD: Tensor) -> None:
        # chunk by chunk to the host: all vectors together may not fit into the device's memory next to the model
        e_ND[rows] = e_BD.cpu()
        progress.update(len(rows))

    with progress, contextlib.ExitStack() as stack:
        for model in copies:
            stack.enter_context(eval_mode(model))
        _share_chunks(copies, plan_groups(token_groups, longest, budget), run, store)
    return e_ND


Chunk = tuple[list[int], list[np.ndarray]]  # row numbers of its texts, and their token ids


def plan_groups(token_groups: Iterable[Sequence[np.ndarray]], longest: int, budget: int) -> Iterator[Chunk]:
    """Yield the chunks that `plan_chunks` makes of all texts, the first ones before the last groups are known.

    The plan starts with the texts of the greatest length, in their order: a chunk full of them is certain, and its
    tokens need not be held. All others depend on texts that may follow.

    Args:
        token_groups: token ids of the texts, in groups.
        longest: tokens of the longest text that there may be.
        budget: maximal number of tokens in a chunk, see `plan_chunks`.

    Yields:
        The chunks.
    """
    size = max(1, budget // longest)
    long: list[tuple[int, np.ndarray]] = []
    others: list[tuple[int, np.ndarray]] = []
    count = 0
    for group in token_groups:
        for row, ids in enumerate(group, count):
            (long if len(ids) == longest else others).append((row, ids))
        count += len(group)
        whole = len(long) // size * size
        for start in range(0, whole, size):
            certain = long[start : start + size]
            yield [row for row, _ in certain], [ids for _, ids in certain]
        long = long[whole:]
    rest = long + others
    for rows in plan_chunks([len(ids) for _, ids in rest], budget):
        yield [rest[row][0] for row in rows], [rest[row][1] for row in rows]


def _share_chunks(
    models: Sequence[EmbeddingModel],
    chunks: Iterator[Chunk],
    run: Callable[[EmbeddingModel, list[np.ndarray]], Tensor],
    store: Callable[[list[int], Tensor], None],
) -> None:
    """Call `store(rows, run(model, token_ids))` once for each chunk.

    A result is stored after the next chunk has been started: the host prepares that one while a GPU computes.

    Several models run in a thread each, since torch releases Python's lock, and take the next chunk when they are free.
    An error in one thread ends all of them and is raised.
    """
    lock, failed = threading.Lock(), threading.Event()

    def take() -> Chunk | None:
        with lock:
            return None if failed.is_set() else next(chunks, None)

    def work(model: EmbeddingModel) -> None:
        device = next(model.parameters()).device
        previous: tuple[list[int], Tensor] | None = None
        # both are per thread: whether gradients are recorded, and the current GPU
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                while (chunk := take()) is not None:
                    rows, token_ids = chunk
                    current = rows, run(model, token_ids)
                    if previous is not None:
                        store(*previous)
                    previous = current
                if previous is not None:
                    store(*previous)
            except BaseException:
                failed.set()
                raise

    if len(models) == 1:
        work(models[0])
        return
    with ThreadPoolExecutor(len(models)) as threads:
        for future in [threads.submit(work, model) for model in models]:
            future.result()
