"""Plan lines that the search commands print before they start: model and data."""

from __future__ import annotations

from raybge.model.folder import read_settings
from raybge.model.spec import EncoderSpec
from raybge.search.deduplication import MAX_SHARED_POSITIVES
from raybge.search.search_data import SearchData
from raybge.util.plural import plural


def describe_model(model: EncoderSpec) -> str:
    """Return the plan line on how texts become vectors, and whether the flags or the model's folder determine it."""
    settings = read_settings(model.model_name_or_path, model.cache_dir)
    flags = model.pooling_method, model.normalize_embeddings
    pooling = model.pooling_method or settings.pooling
    normalize = settings.normalize if model.normalize_embeddings is None else model.normalize_embeddings
    folder = "the model's folder" if settings.source == "modules.json" else "defaults: not stated in the model's folder"
    source = "flags" if None not in flags else folder if flags == (None, None) else f"flags and {folder}"
    lengths = [
        f"{texts} up to {length or settings.max_length or 'the maximum number of'} tokens"
        for texts, length in (("queries", model.query_max_length), ("passages", model.passage_max_length))
    ]
    return (
        f"model: {model.model_name_or_path}, {pooling} pooling, {'' if normalize else 'not '}normalized "
        f"({source}), {', '.join(lengths)}"
    )


def describe_data(data: SearchData, shard_size: int) -> str:
    """Return the plan line on queries and pool.

    Args:
        data: pool and queries.
        shard_size: passages per shard.

    Returns:
        The line.
    """
    queries, unique = data.queries, data.unique
    files, shards = len(queries.survey.files), -(-unique.passages // shard_size)
    truncated = queries.shared_positives.truncated_rows if queries.shared_positives else 0
    note = (
        f"; {truncated:,} rows repeat a query that has {MAX_SHARED_POSITIVES:,} positives or more in all: further "
        "positives may be mined as negatives"
    )
    return (
        f"data: {plural(queries.survey.total_rows, 'row')} in {plural(files, 'file')}; pool of "
        f"{plural(unique.passages, 'passage')} ({plural(unique.duplicates, 'duplicate')} dropped) in "
        f"{plural(shards, 'shard')}"
        f"{note if truncated else ''}"
    )
