"""Encoding of a Ray Dataset: a column `embedding`, computed when the Dataset is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raybge.cli.console import Console
from raybge.cli.options import FILE_FLAGS, EncodeOptions
from raybge.cli.parser import build_options
from raybge.cli.run import errors_name_arguments
from raybge.cluster.connection import current_cluster
from raybge.data.groups import RowError, parse_field
from raybge.encoding.spec import EncodingSpec
from raybge.model.quantization import quantize_embeddings
from raybge.model.spec import EncoderSpec
from raybge.search.actor_pool import map_on_actors, task_tokenizer, tokens_column, tokens_of
from raybge.search.columns import vectors_column
from raybge.search.embedder import Embedder, TextEncoder, device_of, make_embedder, prepare_export
from raybge.util.errors import UserError
from raybge.util.process_state import preserve_process_state

if TYPE_CHECKING:
    from ray.data import Dataset

DATASET_TOKENS = "raybge_tokens"  # column of token ids between two stages, for actors with GPUs
BATCH_ROWS = 1024  # rows of the Dataset that are encoded together


@errors_name_arguments(EncodeOptions)
def encode_ray_dataset(dataset: Dataset, flags: Mapping[str, Any]) -> Dataset:
    """Add a column `embedding` to a Dataset.

    Args:
        dataset: rows with the column `text_field`.
        flags: flags of `raybge.encode`, by name.

    Returns:
        The Dataset with the column; it is computed when it is read.

    Raises:
        UserError: a flag that does not apply to a Dataset, or that cannot be used.
    """
    for name in FILE_FLAGS:
        if name in flags:
            raise UserError(f"{name} does not apply to a Dataset; omit it")
    options = build_options(EncodeOptions, {**flags, "input_file": "", "output_file": ""})
    spec = EncodingSpec.for_dataset(options)

    import ray

    # A Ray that this process is connected to is the Dataset's.
    connection: AbstractContextManager[Any] = (
        nullcontext() if ray.is_initialized() else spec.scale.connect(Console(keeps_ray=True))
    )
    assert spec.model is not None
    with preserve_process_state(), connection:
        prepare_export(spec.model, Console(keeps_ray=True))  # in the user's cache folder: a Dataset has no storage path
        plan = spec.scale.plan(current_cluster(), cores_a_worker=1)
    embedder, text_field = make_embedder(spec.model, plan), spec.parser.text
    arguments = embedder, spec.kind, text_field, spec.precision, spec.ranges_2D, device_of(plan)
    if embedder.tokenized:
        tokenizing = embedder.tokenized, spec.kind, text_field
        dataset = dataset.map_batches(tokenize_column, fn_args=tokenizing, batch_size=None, batch_format="pyarrow")
    return map_on_actors(dataset, ColumnEncoder, arguments, plan, batch_size=BATCH_ROWS)


def tokenize_column(table: pa.Table, model: EncoderSpec, kind: str, text_field: str) -> pa.Table:
    """Append the tokens of a column of texts, for the actors.

    Args:
        table: rows of the Dataset.
        model: the model, whose tokenizer is used.
        kind: "query" or "passage".
        text_field: column of the texts.

    Returns:
        The rows with the column `DATASET_TOKENS`.

    Raises:
        UserError: no such column, or a value that is no text.
    """
    texts = checked_texts(table, text_field)
    queries, passages = ([(text, None) for text in texts], []) if kind == "query" else ([], texts)
    return table.append_column(DATASET_TOKENS, tokens_column(*task_tokenizer(model)(queries, passages)))


def checked_texts(table: pa.Table, text_field: str) -> list[str]:
    """Return the texts of a column; UserError if there is no such column, or a value is no text."""
    if text_field not in table.column_names:
        raise UserError(f"text_field: the Dataset has no column {text_field!r}, only {', '.join(table.column_names)}")
    texts: list[str] = table[text_field].to_pylist()
    try:
        for text in texts:
            parse_field({text_field: text}, text_field)
    except RowError as error:
        raise UserError(f'text_field: "{error.field}" {error.expected}') from None
    return texts


class ColumnEncoder:
    """Ray Data actor: adds the column `embedding`."""

    def __init__(
        self,
        embedder: Embedder,
        kind: str,
        text_field: str,
        precision: Any,
        ranges_2D: np.ndarray | None,
        device: str = "cpu",
    ) -> None:
        """Remember the model; it is loaded at the first batch.

        Args:
            embedder: the model.
            kind: "query" or "passage".
            text_field: column of the texts.
            precision: precision of the vectors.
            ranges_2D: quantization ranges of "int8" and "uint8".
            device: torch device.
        """
        self._encode = TextEncoder(embedder, device)
        self._kind, self._text, self._precision, self._ranges_2D = kind, text_field, precision, ranges_2D

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode one batch."""
        if DATASET_TOKENS in table.column_names:
            vectors_ND = self._encode.encode_token_ids(tokens_of(table[DATASET_TOKENS]), self._kind)
            table = table.drop_columns([DATASET_TOKENS])
        else:
            vectors_ND = self._encode(checked_texts(table, self._text), self._kind)
        vectors_ND = quantize_embeddings(vectors_ND, self._precision, self._ranges_2D)
        return table.append_column("embedding", vectors_column(vectors_ND))
