"""What the flags of `raybge.mine` come to: checked before any file is read, then made into what does the work."""

from __future__ import annotations

import os
import re
from typing import Any

from raybge.cli.options import MineOptions
from raybge.cluster.resources import Plan
from raybge.data.groups import parse_group, parse_passage
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.mining.cross_encoder import Teacher
from raybge.mining.sampling import Sampling
from raybge.model.folder import check_model_folder, check_reranker, vector_width
from raybge.search.model_identity import model_identity
from raybge.search.session import Source, check_apart, check_numbers
from raybge.search.shards import Kind, check_factory, check_gpu_search
from raybge.search.store import Store, digest
from raybge.util.errors import UserError


def check(arguments: MineOptions, embedded: bool) -> Sampling:
    """UserError for flags that cannot be; how to sample. No model of vectors is asked for where they are `embedded`."""
    check_numbers(
        arguments,
        "negative_number",
        "search_batch_size",
        "shard_size",
        "shards_per_actor",
        "batch_size",
        "query_max_len",
        "passage_max_len",
        "reranker_batch_size",
        "reranker_max_length",
        "reranker_query_max_length",
    )
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, found {arguments.seed}")
    Instructions(
        query_format=arguments.query_instruction_format,
        passage_format=arguments.passage_instruction_format,
    )
    if arguments.output_file.endswith(".parquet"):
        raise UserError(f"--output_file {arguments.output_file}: groups are written as .jsonl, .jsonl.gz or .jsonl.zst")
    if arguments.use_gpu_for_searching:
        check_gpu_search()
    _check_teacher(arguments)
    lo, hi = _range(arguments.range_for_sampling)
    if not arguments.score_only and not embedded:
        if not arguments.model_name_or_path:
            raise UserError("missing: --model_name_or_path")
        check_model_folder(arguments.model_name_or_path, "--model_name_or_path")
        check_factory(arguments.index_factory, vector_width(arguments.model_name_or_path, arguments.cache_dir))
    _check_scores(arguments)
    return Sampling(
        lo,
        hi,
        arguments.negative_number,
        arguments.seed,
        arguments.sampling_strategy,
        arguments.absolute_margin,
        arguments.relative_margin,
        arguments.max_score,
        arguments.min_score,
    )


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            "--range_for_sampling takes two ranks lo-hi with lo below hi, such as 2-200 (0-based, lo to "
            f"hi-1), found «{text}»"
        )
    return int(match[1]), int(match[2])


def _check_scores(arguments: MineOptions) -> None:
    for name in ("absolute_margin", "relative_margin"):
        if (value := getattr(arguments, name)) is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name} must be at least 0, found {value:g}")
    low, high = arguments.min_score, arguments.max_score
    if low is not None and high is not None and low > high:
        raise UserError(f"--min_score {low:g} is above --max_score {high:g}: no passage is left")


def _check_teacher(arguments: MineOptions) -> None:
    mining = ("corpus_data", "absolute_margin", "relative_margin", "max_score", "min_score", "keep_scores")
    for name in mining if arguments.score_only else ():
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name}: with --score_only nothing is mined; leave one of the two out")
    if arguments.cross_encoder:
        check_reranker(arguments.cross_encoder, "--cross_encoder", arguments.cache_dir, arguments.trust_remote_code)
        return
    needing = ("score_only", "normalize_scores", "reranker_max_length", "reranker_query_max_length")
    for name in needing:
        if getattr(arguments, name):
            raise UserError(f"--{name}: it needs --cross_encoder")


def sources_of(arguments: MineOptions) -> list[Source]:
    sources = [Source(list_files(arguments.input_file, "--input_file"), "--input_file", parse_group)]
    if arguments.corpus_data and not arguments.score_only:
        flag = "--corpus_data"
        sources.append(Source(list_files(arguments.corpus_data, flag), flag, parse_passage))
    check_apart(arguments.output_file, "--output_file", sources)
    return sources


def encoder_options(arguments: MineOptions) -> dict[str, Any]:
    name = arguments.model_name_or_path or ""
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
        "query_max_length": arguments.query_max_len,
        "passage_max_length": arguments.passage_max_len,
    }


def teacher_of(arguments: MineOptions, store: Store, plan: Plan) -> Teacher | None:
    name = arguments.cross_encoder
    if not name:
        return None
    options = {
        "model_name_or_path": os.path.abspath(name) if os.path.exists(name) else name,
        "use_fp16": arguments.use_fp16,
        "trust_remote_code": arguments.trust_remote_code,
        "cache_dir": arguments.cache_dir,
        "batch_size": arguments.reranker_batch_size,
        "max_length": arguments.reranker_max_length,
        "query_max_length": arguments.reranker_query_max_length,
    }
    identity = digest(model_identity(name, arguments.cache_dir), options, plan.gpus)
    gpu = plan.gpus > 0
    return Teacher(tuple(options.items()), identity, store, plan.cpus, gpu, arguments.normalize_scores)


def kind_of(arguments: MineOptions) -> Kind:
    return Kind(arguments.index_factory, arguments.use_gpu_for_searching)
