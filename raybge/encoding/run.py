"""Encoding of files: read, encode, write the vectors in the order of the input.

The steps of `encode` follow from top to bottom. Encoded blocks are kept in a store, so that an interrupted run
continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyarrow as pa

from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions
from raybge.data.survey import Survey
from raybge.encoding import vector_writer
from raybge.encoding.fields import column_type
from raybge.encoding.row_encoder import EncodedRows, RowEncoding, encode_rows
from raybge.encoding.spec import EncodingSpec
from raybge.encoding.vector_writer import Layout
from raybge.model.model_identity import model_identity
from raybge.search.actor_pool import blocks_in_progress
from raybge.search.embedder import Embedder, make_embedder, with_export_dir
from raybge.search.inputs import open_inputs
from raybge.search.metadata import write_metadata
from raybge.search.plan_lines import describe_model
from raybge.search.stage_clock import StageClock
from raybge.search.store import Store, run_store
from raybge.util.errors import UserError
from raybge.util.plural import plural
from raybge.util.versions import RAYBGE


@dataclass(frozen=True)
class EncodingResult:
    """Result of `raybge.encode_dataset` for files.

    Args:
        output_file: the vectors; a dry run does not write them.
        dim: numbers, or bytes, of each vector; None if this call wrote none.
        counts: numbers of "rows" and of "bad_rows"; empty if the output file existed already.
        seconds: duration of each stage.
    """

    output_file: str
    dim: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def encode(options: EncodeOptions, console: Console, embedder: Embedder | None = None) -> EncodingResult:
    """Run the command.

    Args:
        options: the command's options.
        console: the console.
        embedder: makes the vectors instead of the model.

    Returns:
        The output file, width of the vectors, counts, and seconds of each stage.

    Raises:
        UserError: invalid flags, files or rows.
    """
    spec = EncodingSpec.from_options(options, embedder is not None)
    path, clock = spec.output.path, StageClock()
    finished = vector_writer.is_finished(path)
    if finished and not spec.output.overwrite:
        console.info(f"{path} exists already: nothing to do (--overwrite encodes again)")
        return EncodingResult(path)
    with run_store(spec.output, "encode", finished, console) as store, ExitStack() as stack:
        model = spec.model and with_export_dir(spec.model, store.folder, spec.output.storage_path)
        exports = [model] if model and not spec.output.dry_run else []
        inputs = open_inputs(spec.inputs, spec.scale, store.folder, console, exports)
        cluster, (survey,) = stack.enter_context(inputs)
        plan = spec.scale.plan(cluster, cores_a_worker=1)
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        _print_plan(spec, survey, blocks_in_progress(plan), console)
        counts = {"rows": survey.total_rows, "bad_rows": survey.bad_count}
        if spec.output.dry_run:
            return EncodingResult(path, counts=counts)
        if spec.compute_ranges and survey.total_rows < 2:
            raise UserError(f"--precision {spec.precision}: one vector has no ranges of its own; set --ranges")
        store.keep_on_failure = True
        if embedder is None:
            assert model is not None
            embedder = make_embedder(model, plan)
        encoding = RowEncoding(embedder, spec.kind, spec.parser)
        with clock("encode"):
            rows = encode_rows(survey, encoding, store, plan, spec.compute_ranges, console)
        clock.count("encode", survey.total_rows, "text")
        layout = _layout(spec, rows, store)
        with clock("write"), console.bar("write", survey.total_rows, "row") as bar:
            vector_writer.write(path, rows.blocks, layout, store, bar)
        clock.count("write", survey.total_rows, "row")
        _write_metadata(spec, embedder.identity, layout, counts)
    clock.report(console)
    _print_result(path, survey, layout, console)
    return EncodingResult(path, layout.packed_width, counts, clock.seconds)


def _print_plan(spec: EncodingSpec, survey: Survey, blocks: int, console: Console) -> None:
    if spec.model:
        console.info(describe_model(spec.model))
    console.info(f"data: {plural(survey.total_rows, 'row')}")
    console.detail(f"memory: an actor holds at most {plural(blocks * int(survey.rows.max()), 'row')} at a time")


def _print_result(path: str, survey: Survey, layout: Layout, console: Console) -> None:
    console.info(f"\n{plural(survey.total_rows, 'vector')} of {plural(layout.packed_width, 'number')}, {layout.dtype}")
    console.info(f"written: {path}")


def _layout(spec: EncodingSpec, rows: EncodedRows, store: Store) -> Layout:
    """Return the columns of the output; default fields that no row has are omitted."""
    fields = []
    for name in spec.parser.fields:
        type_ = column_type(rows.kinds[name])
        if type_ is not None or spec.parser.requested:
            fields.append((name, type_ or pa.string()))
    width = store.read(rows.blocks[0].name)["vector"].type.list_size
    ranges_2D = rows.ranges_2D if spec.ranges_2D is None else spec.ranges_2D
    return Layout(pa.schema(fields), width, spec.precision, ranges_2D)


def _write_metadata(spec: EncodingSpec, embedder: str, layout: Layout, counts: Mapping[str, int]) -> None:
    """Write OUTPUT.meta.json, with the ranges by which other vectors must be quantized."""
    write_metadata(
        spec.output.path,
        spec.options,
        {
            "embedder": embedder,
            "model": spec.model and model_identity(spec.model.model_name_or_path, spec.model.cache_dir),
            "counts": counts,
            "dim": layout.width,
            "ranges": None if layout.ranges_2D is None else layout.ranges_2D.tolist(),
            "version": RAYBGE,
        },
    )
