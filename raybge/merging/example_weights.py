"""Merge weights from the source models' losses on examples, as in LM-Cocktail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raybge.cli.console import Console
from raybge.data.groups import RowError, parse_example, parse_group
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import IN_PROCESS_BYTES, skipped_rows_message, survey
from raybge.merging.spec import ExampleSpec, MergingSpec
from raybge.merging.weight_search import MergeCandidate
from raybge.util.errors import UserError
from raybge.util.plural import plural


@dataclass(frozen=True)
class MergeWeights:
    """Weights of a merge and their origin.

    Args:
        weights: one for each source model.
        losses: loss of each source model on the examples; empty if the weights have another origin.
        candidates: candidates that a search evaluated, in order; empty if the weights have another origin.
    """

    weights: list[float]
    losses: Sequence[float] = ()
    candidates: Sequence[MergeCandidate] = ()


def read_examples(spec: MergingSpec, examples: Sequence[Any] | None, console: Console) -> list[Any]:
    """Read and check the examples.

    Args:
        spec: the merge.
        examples: rows as Python objects; None: read the files of the spec.
        console: receives the number of skipped rows.

    Returns:
        Groups for embedding models, (input, output) for language models; empty if the weights have another origin.

    Raises:
        UserError: an example is invalid, or there are none.
    """
    parse: Parse = parse_group if spec.model_type == "encoder" else parse_example
    if examples is not None:
        return _parse_examples(examples, parse)
    if spec.examples is None:
        return []
    files = list_files(spec.examples.data, "--example_data", spec.any_text)
    counts = survey(files, IN_PROCESS_BYTES, parse, spec.on_bad_rows)
    if counts.bad_count:
        console.info(skipped_rows_message(counts, "--example_data"))
    return [row.value for block in counts.blocks for row in read_block(files, block, parse) if isinstance(row, Row)]


def _parse_examples(examples: Sequence[Any], parse: Parse) -> list[Any]:
    rows = []
    for index, example in enumerate(examples):
        try:
            rows.append(parse(example))
        except RowError as error:
            raise UserError(f'example_data[{index}]: "{error.field}" {error.expected}') from error
    if not rows:
        raise UserError("example_data is empty")
    return rows


def score_models(spec: MergingSpec, rows: list[Any], console: Console) -> MergeWeights:
    """Compute each model's loss on the examples in a Ray task of its own, and the weights from the losses.

    Args:
        spec: the merge; its `examples` are set.
        rows: see `read_examples`.
        console: receives the plan and the progress.

    Returns:
        The weights and the losses; no weights on a dry run, which ends after the plan.

    Raises:
        UserError: a model cannot be loaded, or its loss is not finite.
    """
    from raybge.merging.example_loss import weights_from_losses

    assert spec.examples is not None
    losses = _losses(spec, spec.examples, rows, console)
    if spec.dry_run:
        return MergeWeights([])
    for name, loss in zip(spec.paths, losses, strict=True):
        if not math.isfinite(loss):
            raise UserError(f"--model_names_or_paths {name}: its loss on the examples is not finite ({loss})")
    return MergeWeights(weights_from_losses(losses, spec.examples.temperature), losses)


def _losses(spec: MergingSpec, settings: ExampleSpec, rows: list[Any], console: Console) -> list[float]:
    from raybge.cluster.autoscaling import wait_for_capacity
    from raybge.cluster.remote_calls import results_in_order
    from raybge.cluster.shared_paths import check_shared
    from raybge.merging.example_loss import ExampleSet
    from raybge.search.embedder import device_of

    examples = ExampleSet(
        spec.model_type,
        rows,
        settings.batch_size,
        settings.max_input_length,
        settings.neg_number,
        settings.seed,
        spec.cache_dir,
        spec.trust_remote_code,
    )
    losses: list[float] = []
    scale = spec.scale
    with scale.connect(console) as cluster:
        import ray

        requested = scale.num_workers, scale.use_gpu, scale.cpus_per_worker
        cluster = wait_for_capacity(cluster, *requested, console.info)
        check_shared(cluster, {}, {"--model_names_or_paths": spec.paths})
        plan = scale.plan(cluster)
        console.info(f"cluster: {cluster.describe()}; {plan.describe('worker')}, one model per worker at a time")
        console.info(f"{plural(len(rows), 'example')}, batches of {settings.batch_size}")
        if spec.dry_run:
            return []
        score = ray.remote(ExampleSet.loss).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
        calls = [(score.remote, examples, path, plan.cpus, device_of(plan)) for path in spec.paths]
        with console.bar("score", len(spec.paths), "model", start_up="starting workers, loading the models") as bar:
            for loss in results_in_order(calls, plan.workers):
                losses.append(loss)
                bar.update(1)
    return losses
