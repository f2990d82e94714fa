"""Pool of Ray Data actors that run a model on blocks, and the tokens that CPU tasks make ahead of those with a GPU.

A block takes a GPU a twentieth of a second. Several are in progress in each actor: one runs in the model while others
are received, padded or written. Each is reported when it is written, so a lost actor leaves none out.

Letters in array names: N texts, T tokens of all texts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raybge.cluster.resources import Plan

if TYPE_CHECKING:
    from ray.data import Dataset

    from raybge.data.tokenize import TextTokenizer
    from raybge.model.spec import EncoderSpec

TOKENS = "tokens"  # column of the token ids of each text
# Blocks in progress in an actor with a GPU. A CPU is busy with one, and a second one would take memory for nothing.
BLOCKS_ON_GPU = 4
CPUS_ON_GPU = 2  # most CPUs of an actor with a GPU: one starts kernels, one prepares and writes; others tokenize


def blocks_in_progress(plan: Plan) -> int:
    """Return how many blocks an actor holds at a time."""
    return BLOCKS_ON_GPU if plan.gpus else 1


def map_on_actors(
    dataset: Dataset,
    actor: type,
    arguments: tuple[Any, ...],
    plan: Plan,
    blocks: int | None = None,
    batch_size: int | None = None,
) -> Dataset:
    """Map a dataset on actors, `plan.workers` or one for each block.

    Args:
        dataset: the dataset.
        actor: callable class; with a GPU, it is called by several threads at a time.
        arguments: arguments of its constructor.
        plan: actors and their resources.
        blocks: number of blocks; None: unknown.
        batch_size: rows of a call; None: a block.

    Returns:
        The mapped dataset.
    """
    import ray

    calls = blocks_in_progress(plan)
    threads: dict[str, Any] = {}
    if calls > 1:
        threads = {"max_concurrent_calls_per_actor": calls, "enable_true_multi_threading": True}
    return dataset.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, blocks or plan.workers), **threads),
        num_cpus=min(plan.cpus, CPUS_ON_GPU) if plan.gpus else plan.cpus,
        num_gpus=plan.gpus,
    )


def task_tokenizer(model: EncoderSpec) -> TextTokenizer:
    """Return the tokenizer of a model's queries and passages in a Ray task of one CPU."""
    from raybge.model.text_lengths import load_text_tokenizer  # imports torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_text_tokenizer(model)


def tokens_column(length_N: np.ndarray, token_T: np.ndarray) -> pa.LargeListArray:
    """Return the token ids of N texts as a column of lists.

    Args:
        length_N: tokens of each text.
        token_T: the tokens of all texts, int32.

    Returns:
        The column, of N lists of int32.
    """
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_N, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(token_T, pa.int32()))


def tokens_of(column: pa.ChunkedArray | pa.Array) -> list[np.ndarray]:
    """Return the token ids of each text of a column of lists."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    token_T = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(token_T, np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))[:-1]) if len(lists) else []
