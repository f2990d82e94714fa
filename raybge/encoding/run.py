"""Write the vectors of rows of text, on all of a cluster's devices, in the input's order.

    python -m raybge.encode --model_name_or_path runs/mine --input_file corpus.jsonl --output_file corpus.parquet
    python -m raybge.encode --model_name_or_path runs/mine --input_file dev.jsonl --output_file dev.npy \\
        --text_field query --kind query
    python -m raybge.encode --help

From Python: `raybge.encode_dataset(model_name_or_path=..., input_file=..., output_file=...)`, or with a Ray Dataset.

What is encoded is kept beside the output, or under `--storage_path`: a run that was killed goes on where it was.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

    from raybge.encoding.vector_writer import Layout
    from raybge.search.pipeline import Embedder
    from raybge.search.store import Store
    from raybge.search.vectors import Encoded, RowParser

BATCH_ROWS = 1024  # of a person's own Dataset: encoded together
# Flags that say what is read and written: a Dataset says it itself.
OF_FILES = ("input_file", "output_file", "keep_fields", "on_bad_rows", "overwrite", "storage_path", "dry_run")


def encode(arguments: EncodeOptions, console: Console, embedder: Embedder | None = None) -> dict[str, Any]:
    """The command: check, read, plan, encode, write, sum up. `embedder` makes the vectors in place of the model."""
    from raybge.cluster.resources import plan_workers
    from raybge.data.source_files import list_files
    from raybge.encoding import vector_writer as vector_files
    from raybge.search.session import Source, Stages, check_apart, describe_model, embedder_of, opened, store_of_run
    from raybge.search.vectors import Encoding, RowParser, encode_rows

    width = _check(arguments, embedder is not None)
    ranges = _ranges(arguments, width)
    kept = None if arguments.keep_fields is None else tuple(dict.fromkeys(arguments.keep_fields))
    parser = RowParser(arguments.text_field, kept)
    sources = [Source(list_files(arguments.input_file, "--input_file"), "--input_file", parser)]
    check_apart(arguments.output_file, "--output_file", sources)
    finished = vector_files.is_finished(arguments.output_file)
    if finished and not arguments.overwrite:
        console.info(f"{arguments.output_file} is there already: nothing to do (--overwrite encodes it anew)")
        return {"output_file": arguments.output_file, "already_there": True}
    options = _encoder_options(arguments)
    model = "" if embedder else describe_model(options)
    stages = Stages()
    with (
        store_of_run(arguments, "encode", finished) as store,
        opened(arguments, sources, store.folder, console) as (cluster, (survey,)),
    ):
        plan = plan_workers(
            cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1
        )
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        if model:
            console.info(model)
        console.info(f"data: {survey.total_rows:,} rows; an actor holds {int(survey.rows.max()):,} at most at a time")
        summary: dict[str, Any] = {"rows": survey.total_rows, "bad_rows": survey.bad_count}
        if arguments.dry_run:
            return {**summary, "dry_run": True}
        seek = arguments.precision in ("int8", "uint8") and ranges is None
        if seek and survey.total_rows < 2:
            raise UserError(f"--precision {arguments.precision}: one vector has no ranges of its own; give --ranges")
        store.precious = True
        encoding = Encoding(embedder or embedder_of(options, plan), arguments.kind, parser)
        with stages("encode"):
            encoded = encode_rows(survey, encoding, store, plan, seek, console)
        stages.count("encode", survey.total_rows, "texts")
        layout = _layout(arguments, parser, encoded, ranges, store)
        with stages("write"), console.bar("write", survey.total_rows, "rows") as bar:
            vector_files.write(arguments.output_file, encoded.pieces, layout, store, bar)
        stages.count("write", survey.total_rows, "rows")
        _write_meta(arguments, encoding.embedder.identity, layout, summary)
    stages.say(console)
    console.info(f"{survey.total_rows:,} vectors of {layout.packed} numbers, {layout.dtype}")
    console.info(f"written: {arguments.output_file}")
    return {**summary, "dim": layout.packed, "seconds": stages.seconds, "output_file": arguments.output_file}


# --- check ------------------------------------------------------------------------------------------------


def _check(arguments: EncodeOptions, embedded: bool = False) -> int | None:
    """UserError for flags that cannot be; the width of the vectors, where the model's folder says it.

    No model is asked for where the texts are `embedded`.
    """
    from raybge.data.prompts import Instructions
    from raybge.model.folder import check_model_folder, vector_width
    from raybge.search.session import check_numbers

    check_numbers(arguments, "batch_size", "max_length", "truncate_dim")
    Instructions(
        query_format=arguments.query_instruction_format,
        passage_format=arguments.passage_instruction_format,
    )
    if "embedding" in (arguments.keep_fields or ()):
        raise UserError("--keep_fields embedding: the vectors are written under this name")
    if arguments.ranges and arguments.precision not in ("int8", "uint8"):
        raise UserError(f"--ranges: vectors in {arguments.precision} have none; it needs --precision int8 or uint8")
    if embedded:
        return None
    check_model_folder(arguments.model_name_or_path, "--model_name_or_path")
    width = vector_width(arguments.model_name_or_path, arguments.cache_dir)
    if width and arguments.truncate_dim and arguments.truncate_dim > width:
        raise UserError(f"--truncate_dim {arguments.truncate_dim}: this model's vectors have {width} numbers")
    return arguments.truncate_dim or width


def _encoder_options(arguments: EncodeOptions) -> dict[str, Any]:
    name = arguments.model_name_or_path
    return {
        "model_name_or_path": os.path.abspath(name) if os.path.exists(name) else name,
        "normalize_embeddings": arguments.normalize_embeddings,
        "use_fp16": arguments.use_fp16,
        "query_instruction_for_retrieval": arguments.query_instruction_for_retrieval,
        "query_instruction_format": arguments.query_instruction_format,
        "passage_instruction_for_retrieval": arguments.passage_instruction_for_retrieval,
        "passage_instruction_format": arguments.passage_instruction_format,
        "pooling_method": arguments.pooling_method,
        "trust_remote_code": arguments.trust_remote_code,
        "cache_dir": arguments.cache_dir,
        "batch_size": arguments.batch_size,
        "query_max_length": arguments.max_length,
        "passage_max_length": arguments.max_length,
        "truncate_dim": arguments.truncate_dim,
    }


def _ranges(arguments: EncodeOptions, width: int | None) -> Any:
    """(2, D) as --ranges gives them; None without. UserError where they are not for vectors of that width."""
    import json

    import numpy as np

    path = arguments.ranges
    if path is None:
        return None
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as file:
                found = np.array(json.load(file)["ranges"], np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ranges {path} holds no ranges ({type(error).__name__}: {error})") from error
    if found.dtype.kind != "f" or found.shape != (2, width or found.shape[-1]):
        shape = f"(2, {width or 'D'})"
        raise UserError(f"--ranges {path}: expected floats of the shape {shape}, found {found.dtype} {found.shape}")
    return found


# --- what is written --------------------------------------------------------------------------------------


def _layout(arguments: EncodeOptions, parser: RowParser, encoded: Encoded, ranges: Any, store: Store) -> Layout:
    import pyarrow as pa

    from raybge.encoding.vector_writer import Layout
    from raybge.search.vectors import column_type

    fields = []
    for name in parser.kept:
        kind = column_type(encoded.kinds[name])
        if kind is not None or parser.asked:
            fields.append((name, kind or pa.string()))
    width = store.read(encoded.pieces[0].name)["vector"].type.list_size
    precision: Any = arguments.precision
    return Layout(pa.schema(fields), width, precision, encoded.ranges_2D if ranges is None else ranges)


def _write_meta(arguments: EncodeOptions, embedder: str, layout: Layout, summary: dict[str, Any]) -> None:
    """Beside the output: what it was made of and with, and the ranges that other vectors must be quantised with."""
    import dataclasses
    import json

    from raybge.util import atomic_write as output
    from raybge.util.filesystem import extended
    from raybge.util.redaction import public_values
    from raybge.util.versions import RAYBGE

    about = {
        "options": public_values(dataclasses.asdict(arguments)),
        "embedder": embedder,
        "counts": summary,
        "dim": layout.width,
        "ranges": None if layout.ranges_2D is None else layout.ranges_2D.tolist(),
        "version": RAYBGE,
    }
    with output.written_aside(extended(arguments.output_file, ".meta.json"), "--output_file") as out:
        out.write((json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())


# --- a Ray Dataset ----------------------------------------------------------------------------------------


def _encoded_dataset(dataset: Dataset, arguments: EncodeOptions) -> Dataset:
    import ray

    from raybge.cluster.resources import connect, plan_workers
    from raybge.search.session import embedder_of
    from raybge.search.vectors import EncodeColumn, device_of

    ranges = _ranges(arguments, _check(arguments))
    if arguments.precision in ("int8", "uint8") and ranges is None:
        raise UserError(f"precision {arguments.precision}: a Dataset is encoded as it is read; give its `ranges`")
    with connect(arguments.address, arguments.verbose) as cluster:  # the one that the Dataset is on
        plan = plan_workers(
            cluster, arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker, cores_a_worker=1
        )
    embedder = embedder_of(_encoder_options(arguments), plan)
    return dataset.map_batches(
        EncodeColumn,
        fn_constructor_args=(
            embedder,
            arguments.kind,
            arguments.text_field,
            arguments.precision,
            ranges,
            device_of(plan),
        ),
        batch_size=BATCH_ROWS,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=plan.workers),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
