"""Inputs of a search command: files of a flag, checked and surveyed, and the Ray cluster that reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from raybge.cli.console import Console
from raybge.cluster.autoscaling import wait_for_capacity
from raybge.cluster.resources import Cluster
from raybge.cluster.shared_paths import check_shared
from raybge.cluster.spec import ScaleSpec
from raybge.data.jsonl import Parse
from raybge.data.source_files import SourceFile
from raybge.data.survey import IN_PROCESS_BYTES, Survey, skipped_rows_message, survey
from raybge.data.transcode import transcode
from raybge.model.preflight import word_sample
from raybge.model.spec import EncoderSpec, RerankerSpec
from raybge.search.embedder import prepare_export
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem
from raybge.util.redaction import redact

BLOCK_BYTES = 256 << 10  # input bytes of a block at least; a block is read, encoded and searched together
MAX_BLOCKS = 32_768  # the driver holds a name and some numbers per block


@dataclass(frozen=True)
class InputFiles:
    """Files of a flag, and the parser of their rows."""

    files: list[SourceFile]
    flag: str
    parse: Parse


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a command, and the paths that every node of the cluster must see.

    Args:
        inputs: files with rows, by flag.
        on_bad_rows: "stop" or "skip".
        written: output files by flag; None is not written.
        models: model folders or hub names by flag; None is not read.
        encoders: models whose tokenizers must know most words of the inputs.
        allow_unknown_tokens: do not check the words.
    """

    inputs: Sequence[InputFiles]
    on_bad_rows: str = "stop"
    written: Mapping[str, str | None] = field(default_factory=dict)
    models: Mapping[str, str | None] = field(default_factory=dict)
    encoders: Sequence[EncoderSpec | RerankerSpec] = ()
    allow_unknown_tokens: bool = False


def check_not_an_input(path: str, flag: str, inputs: Sequence[InputFiles]) -> None:
    """Check that an output file is not one of the input files.

    Args:
        path: the output file.
        flag: its flag.
        inputs: the files that are read.

    Raises:
        UserError: the file is also read.
    """
    for source in inputs:
        for file in source.files:
            if _real_path(file.name) == _real_path(path):
                raise UserError(f"{flag} {path} is a file that {source.flag} reads; choose another name")


def _real_path(path: str) -> str:
    return redact(path) if "://" in path else os.path.realpath(filesystem(path)[1])


@contextmanager
def open_inputs(
    spec: InputSpec, scale: ScaleSpec, work: str, console: Console, exports: Sequence[EncoderSpec] = ()
) -> Iterator[tuple[Cluster, list[Survey]]]:
    """Connect to Ray and survey all inputs. Small inputs are surveyed before Ray starts.

    Args:
        spec: the inputs.
        scale: the cluster and the workers that it must hold.
        work: folder for unpacked files and surveys.
        console: prints skipped rows.
        exports: models that are exported, where their backend requires it, once the rows are checked.

    Yields:
        The cluster, and the survey of each input.

    Raises:
        UserError: a bad row, a path that a node of the cluster does not see, or a model that cannot be exported.
    """

    def survey_all() -> list[Survey]:
        with console.phase("checking the rows"):
            surveys = [survey_input(source, work, spec.on_bad_rows, console) for source in spec.inputs]
        with console.phase("checking the model"):
            _check_models(spec, surveys)
        for model in exports:
            prepare_export(model, console)
        return surveys

    small = sum(file.size for source in spec.inputs for file in source.files) <= IN_PROCESS_BYTES
    with ExitStack() as stack:
        surveys = survey_all() if small else []
        cluster = stack.enter_context(scale.connect(console))
        cluster = wait_for_capacity(cluster, scale.num_workers, scale.use_gpu, scale.cpus_per_worker, console.info)
        read = {source.flag: [file.path for file in source.files] for source in spec.inputs}
        models = {flag: [name] for flag, name in spec.models.items()}
        check_shared(cluster, {**spec.written, "--storage_path": work}, {**read, **models})
        yield cluster, surveys if small else survey_all()


def _check_models(spec: InputSpec, surveys: Sequence[Survey]) -> None:
    """Check that each model fits its tokenizer, and that this knows most words of a sample of the inputs."""

    def texts() -> list[str]:
        parts = zip(spec.inputs, surveys, strict=True)
        return [text for source, each in parts for text in word_sample(each, source.parse, len(surveys))]

    for encoder in spec.encoders:
        encoder.check(None if spec.allow_unknown_tokens or not surveys else texts)


def survey_input(source: InputFiles, work: str, on_bad_rows: str, console: Console) -> Survey:
    """Count the usable rows of an input, block by block.

    Args:
        source: the files.
        work: folder for unpacked files and, if local, for the cached survey.
        on_bad_rows: "stop" or "skip".
        console: prints skipped rows.

    Returns:
        The survey.

    Raises:
        UserError: a bad row with "stop", or no usable row.
    """
    files = transcode(source.files, append_to_path(work, "/unpacked"))
    block_bytes = max(BLOCK_BYTES, -(-sum(file.size for file in files) // MAX_BLOCKS))
    cache = None if "://" in work else f"{work}/surveys"
    result = survey(files, block_bytes, source.parse, on_bad_rows, cache)
    if result.bad_count:
        console.info(skipped_rows_message(result, source.flag))
    return result
