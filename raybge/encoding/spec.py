"""EncodingSpec: the options of `raybge.encode`, checked and resolved before any row is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from raybge.cli.checks import check_at_least
from raybge.cli.options import EncodeOptions
from raybge.cluster.spec import ScaleSpec
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.encoding.fields import RowParser
from raybge.model.folder import vector_width
from raybge.model.folder_checks import check_model_folder
from raybge.model.quantization import Precision
from raybge.model.spec import EncoderSpec
from raybge.search.inputs import InputFiles, InputSpec, check_not_an_input
from raybge.search.spec import OutputSpec
from raybge.util.errors import UserError

WITH_RANGES = ("int8", "uint8")  # precisions that need a range per dimension


@dataclass(frozen=True)
class EncodingSpec:
    """An encoding run.

    Args:
        model: embedding model; None if the caller supplies an embedder.
        kind: "query" or "passage": whose instruction and length apply.
        parser: text and fields of a row.
        inputs: the rows; none for a Dataset.
        precision: precision of the written vectors.
        ranges_2D: quantization ranges, minimum and maximum of each dimension; None: none, or those of the vectors.
        output: output file or folder.
        scale: workers and cluster.
        options: all options, for the metadata.
    """

    model: EncoderSpec | None
    kind: str
    parser: RowParser
    inputs: InputSpec
    precision: Precision
    ranges_2D: np.ndarray | None
    output: OutputSpec
    scale: ScaleSpec
    options: Mapping[str, Any]

    @property
    def compute_ranges(self) -> bool:
        """True if the quantization ranges are those of the vectors themselves."""
        return self.precision in WITH_RANGES and self.ranges_2D is None

    @classmethod
    def from_options(cls, options: EncodeOptions, has_embedder: bool = False) -> EncodingSpec:
        """Check and resolve the options of an encoding of files.

        Args:
            options: the command's options.
            has_embedder: the caller supplies an embedder; no model is required.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag, or a missing file.
        """
        _check_options(options)
        width = None if has_embedder else _checked_width(options)
        ranges_2D = _read_ranges(options.ranges, width)
        parser = _row_parser(options)
        inputs = [
            InputFiles(list_files(options.input_file, "--input_file", options.accept_any_text), "--input_file", parser)
        ]
        check_not_an_input(options.output_file, "--output_file", inputs)
        written, models = {"--output_file": options.output_file}, {"--model_name_or_path": options.model_name_or_path}
        model = None if has_embedder else EncoderSpec.from_options(options)
        input_spec = InputSpec(
            inputs, options.on_bad_rows, written, models, [model] if model else [], options.allow_unknown_tokens
        )
        return cls._build(options, parser, input_spec, ranges_2D, model)

    @classmethod
    def for_dataset(cls, options: EncodeOptions) -> EncodingSpec:
        """Check and resolve the options of an encoding of a Ray Dataset, which has no files.

        Args:
            options: the command's options; `input_file` and `output_file` are ignored.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag.
        """
        _check_options(options)
        ranges_2D = _read_ranges(options.ranges, _checked_width(options))
        if options.precision in WITH_RANGES and ranges_2D is None:
            raise UserError(
                f"precision {options.precision}: a Dataset is encoded while it is read, before its ranges are known; "
                "set `ranges`"
            )
        return cls._build(options, _row_parser(options), InputSpec([]), ranges_2D, EncoderSpec.from_options(options))

    @classmethod
    def _build(
        cls,
        options: EncodeOptions,
        parser: RowParser,
        inputs: InputSpec,
        ranges_2D: np.ndarray | None,
        model: EncoderSpec | None,
    ) -> EncodingSpec:
        return cls(
            model=model,
            kind=options.kind,
            parser=parser,
            inputs=inputs,
            precision=cast(Precision, options.precision),
            ranges_2D=ranges_2D,
            output=OutputSpec.from_options(options),
            scale=ScaleSpec.from_options(options, on_cpu=model is not None and model.backend.exported),
            options=asdict(options),
        )


def _row_parser(options: EncodeOptions) -> RowParser:
    fields = options.keep_fields
    return RowParser(options.text_field, None if fields is None else tuple(dict.fromkeys(fields)))


def _check_options(options: EncodeOptions) -> None:
    check_at_least(1, options, "batch_size", "max_length", "truncate_dim")
    Instructions(query_format=options.query_instruction_format, passage_format=options.passage_instruction_format)
    if "embedding" in (options.keep_fields or ()):
        raise UserError("--keep_fields embedding: the vectors are written under this name; omit it")
    if options.ranges and options.precision not in WITH_RANGES:
        raise UserError(f"--ranges requires --precision int8 or uint8, found --precision {options.precision}")


def _checked_width(options: EncodeOptions) -> int | None:
    """Check the model folder and return the width of the written vectors; None if the folder does not state it."""
    check_model_folder(options.model_name_or_path, "--model_name_or_path")
    width = vector_width(options.model_name_or_path, options.cache_dir)
    if width and options.truncate_dim and options.truncate_dim > width:
        raise UserError(
            f"--truncate_dim {options.truncate_dim}: this model's vectors have {width} numbers; use at most {width}"
        )
    return options.truncate_dim or width


def _read_ranges(path: str | None, width: int | None) -> np.ndarray | None:
    """Return the ranges of --ranges, (2, D); None if unset."""
    if path is None:
        return None
    try:
        if path.endswith(".npy"):
            ranges_2D = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as file:
                ranges_2D = np.array(json.load(file)["ranges"], np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--ranges {path} holds no ranges ({type(error).__name__}: {error}); expected a .npy of shape (2, D) or "
            "the .meta.json of an output in int8 or uint8"
        ) from error
    if ranges_2D.dtype.kind != "f" or ranges_2D.shape != (2, width or ranges_2D.shape[-1]):
        shape = f"(2, {width or 'D'})"
        raise UserError(
            f"--ranges {path}: expected floats of the shape {shape}, found {ranges_2D.dtype} {ranges_2D.shape}"
        )
    return ranges_2D
