"""MiningSpec: the options of `raybge.mine`, checked and resolved before any row is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raybge.cli.checks import check_at_least, check_requires
from raybge.cli.options import MineOptions
from raybge.cli.parser import changed_values, preset_values
from raybge.cluster.spec import ScaleSpec
from raybge.data.groups import parse_group, parse_passage
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.language_model.spec import ChatSpec
from raybge.mining.relabelling import RelabelSpec
from raybge.mining.rescoring import search_depth
from raybge.mining.sampling import SamplingSpec
from raybge.model.backends.choice import TORCH
from raybge.model.folder import vector_width
from raybge.model.folder_checks import check_model_folder, check_reranker
from raybge.model.spec import EncoderSpec, RerankerSpec
from raybge.search.faiss_index import check_factory
from raybge.search.inputs import InputFiles, InputSpec, check_not_an_input
from raybge.search.spec import IndexSpec, OutputSpec
from raybge.util.errors import UserError


@dataclass(frozen=True)
class MiningSpec:
    """A mining run.

    Args:
        model: embedding model; None if the caller supplies an embedder or with `score_only`.
        cross_encoder: cross-encoder whose scores replace the embedding model's; None for none.
        normalize_scores: apply the sigmoid to the cross-encoder's output.
        relabel: what becomes of negatives that are taken for positives; None leaves them as they are.
        judge: language model that judges the negatives; None: the cross-encoder does.
        score_only: score the rows with the cross-encoder, mine nothing.
        inputs: groups and, with `corpus_data`, passages.
        index: index of the pool.
        sampling: choice of negatives.
        keep_scores: write `pos_scores` and `neg_scores`.
        rescore: score candidates again in fp32.
        output: output file.
        scale: workers and cluster.
        options: all options, for the metadata.
        flags: options that differ from their defaults, for the report.
        preset: line on the preset and the values of its flags; empty without one.
    """

    model: EncoderSpec | None
    cross_encoder: RerankerSpec | None
    normalize_scores: bool
    relabel: RelabelSpec | None
    judge: ChatSpec | None
    score_only: bool
    inputs: InputSpec
    index: IndexSpec
    sampling: SamplingSpec
    keep_scores: bool
    rescore: bool
    output: OutputSpec
    scale: ScaleSpec
    options: Mapping[str, Any]
    flags: Mapping[str, Any]
    preset: str = ""

    @property
    def search_depth(self) -> int:
        """Number of candidates per query: more than ranks if fp32 orders them again."""
        return search_depth(self.sampling.hi) if self.rescore else self.sampling.hi

    @classmethod
    def from_options(cls, options: MineOptions, has_embedder: bool = False) -> MiningSpec:
        """Check and resolve the options.

        Args:
            options: the command's options.
            has_embedder: the caller supplies an embedder; no model is required.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag, or a missing file.
        """
        check_options(options, has_embedder)
        model = None if has_embedder or options.score_only else EncoderSpec.from_options(options)
        cross_encoder = RerankerSpec.from_options(options) if options.cross_encoder else None
        return cls(
            model=model,
            cross_encoder=cross_encoder,
            normalize_scores=options.normalize_scores,
            relabel=_relabel_spec(options),
            judge=ChatSpec.from_options(options) if options.judge_url else None,
            score_only=options.score_only,
            inputs=_input_spec(options, [each for each in (model, cross_encoder) if each]),
            index=IndexSpec.from_options(options),
            sampling=_sampling_spec(options),
            keep_scores=options.keep_scores,
            rescore=options.rescore,
            output=OutputSpec.from_options(options),
            scale=ScaleSpec.from_options(options, on_cpu=model is not None and model.backend.exported),
            options=asdict(options),
            flags=changed_values(options),
            preset=_describe_preset(options),
        )


def check_options(options: MineOptions, has_embedder: bool = False) -> None:
    """Check the options without reading the input.

    Args:
        options: the command's options.
        has_embedder: the caller supplies an embedder; no model is required.

    Raises:
        UserError: an invalid flag or model.
    """
    check_at_least(
        1,
        options,
        "negative_number",
        "batch_size",
        "query_max_len",
        "passage_max_len",
        "reranker_batch_size",
        "reranker_max_length",
        "reranker_query_max_length",
    )
    check_at_least(0, options, "seed")
    Instructions(query_format=options.query_instruction_format, passage_format=options.passage_instruction_format)
    if options.output_file.endswith(".parquet"):
        raise UserError(f"--output_file {options.output_file}: groups are written as .jsonl, .jsonl.gz or .jsonl.zst")
    IndexSpec.from_options(options)
    _check_relabelling(options)
    _check_cross_encoder(options)
    parse_rank_range(options.range_for_sampling)
    if not options.score_only and not has_embedder:
        if not options.model_name_or_path:
            score = " (or --score_only, which only scores the rows)" if options.cross_encoder else ""
            raise UserError(f"missing: --model_name_or_path{score}")
        check_model_folder(options.model_name_or_path, "--model_name_or_path")
        _check_rescore(options)
        check_factory(options.index_factory, vector_width(options.model_name_or_path, options.cache_dir))
    _check_scores(options)


def parse_rank_range(text: str) -> tuple[int, int]:
    """Parse `--range_for_sampling`.

    Args:
        text: the flag's value.

    Returns:
        (lo, hi): 0-based ranks lo to hi - 1.

    Raises:
        UserError: not two ranks lo-hi with lo below hi.
    """
    match = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            "--range_for_sampling takes two ranks lo-hi with lo below hi, such as 2-200 (0-based, lo to "
            f"hi-1), found «{text}»"
        )
    return int(match[1]), int(match[2])


def _check_rescore(options: MineOptions) -> None:
    """Raise UserError if --rescore has nothing to do, since the model computes in fp32."""
    if not options.rescore:
        return
    fp16 = options.use_gpu and options.use_fp16 and options.encode_backend == TORCH and not options.encode_precision
    if not (fp16 or options.use_bf16 or options.encode_precision in ("bf16", "int8")):
        raise UserError(
            "--rescore: the candidates are in fp32 already: set --encode_precision bf16, or --encode_backend openvino "
            "--encode_precision int8, or on GPUs --use_gpu, or omit --rescore"
        )


def _describe_preset(options: MineOptions) -> str:
    """Return the line on the flags that the preset determines, and on those that the command sets to another value."""
    preset, changed = preset_values(MineOptions, options.preset), []
    for name, value in preset.items():
        if getattr(options, name) != value:
            changed.append(f"--{name} {getattr(options, name)} in place of {value}")
    unchanged = " ".join(f"--{name} {value}" for name, value in preset.items() if getattr(options, name) == value)
    return "; ".join([f"preset {options.preset}: {unchanged}".rstrip(), *changed]) if preset else ""


def _check_scores(options: MineOptions) -> None:
    for name in ("absolute_margin", "relative_margin"):
        if (value := getattr(options, name)) is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name} must be at least 0, found {value:g}")
    low, high = options.min_score, options.max_score
    if low is not None and high is not None and low > high:
        raise UserError(f"--min_score {low:g} is above --max_score {high:g}: no passage can satisfy both")


def _check_cross_encoder(options: MineOptions) -> None:
    if options.score_only and options.preset:
        raise UserError("--preset chooses negatives, --score_only mines nothing; omit one of the two")
    mining_only = (
        "corpus_data",
        "judge_url",
        "absolute_margin",
        "relative_margin",
        "max_score",
        "min_score",
        "keep_scores",
        "rescore",
    )
    for name in mining_only if options.score_only else ():
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name}: --score_only mines nothing; omit one of the two")
    if options.cross_encoder:
        check_reranker(options.cross_encoder, "--cross_encoder", options.cache_dir, options.trust_remote_code)
        return
    for name in ("score_only", "normalize_scores", "reranker_max_length", "reranker_query_max_length"):
        if getattr(options, name):
            raise UserError(f"--{name} requires --cross_encoder")


def _check_relabelling(options: MineOptions) -> None:
    if not options.relabel:
        for name in ("relabel_margin", "judge_url"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} requires --relabel drop, promote or soft")
    elif not (options.cross_encoder or options.judge_url):
        raise UserError(f"--relabel {options.relabel} requires --cross_encoder, or --judge_url and --judge_model")
    if options.judge_url and options.cross_encoder:
        raise UserError("--judge_url and --cross_encoder both judge the negatives: omit one of the two")
    for name in ("judge_model", "judge_concurrency", "judge_timeout", "judge_parameters"):
        check_requires(options, name, "judge_url")
    check_requires(options, "relabel_margin", "cross_encoder")
    if options.relabel_margin is not None and not math.isfinite(options.relabel_margin):
        raise UserError(f"--relabel_margin must be finite, found {options.relabel_margin:g}")
    if options.judge_url and options.relabel == "soft" and options.keep_scores:
        raise UserError("--keep_scores and --relabel soft write other values into the same fields: omit one of the two")


def _relabel_spec(options: MineOptions) -> RelabelSpec | None:
    return RelabelSpec(options.relabel, options.relabel_margin or 0.0) if options.relabel else None


def _input_spec(options: MineOptions, encoders: Sequence[EncoderSpec | RerankerSpec]) -> InputSpec:
    inputs = [
        InputFiles(list_files(options.input_file, "--input_file", options.accept_any_text), "--input_file", parse_group)
    ]
    if options.corpus_data and not options.score_only:
        inputs.append(
            InputFiles(
                list_files(options.corpus_data, "--corpus_data", options.accept_any_text),
                "--corpus_data",
                parse_passage,
            )
        )
    check_not_an_input(options.output_file, "--output_file", inputs)
    models = {"--model_name_or_path": options.model_name_or_path, "--cross_encoder": options.cross_encoder}
    written = {"--output_file": options.output_file}
    return InputSpec(inputs, options.on_bad_rows, written, models, encoders, options.allow_unknown_tokens)


def _sampling_spec(options: MineOptions) -> SamplingSpec:
    lo, hi = parse_rank_range(options.range_for_sampling)
    return SamplingSpec(
        lo,
        hi,
        options.negative_number,
        options.seed,
        options.sampling_strategy,
        options.absolute_margin,
        options.relative_margin,
        options.max_score,
        options.min_score,
    )
