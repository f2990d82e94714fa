"""Evaluation of merge candidates during a search: each candidate is written, encoded and measured by retrieval."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from raybge.cli.console import Console
from raybge.data.jsonl import Row, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import skipped_rows_message, survey
from raybge.merging.example_weights import MergeWeights
from raybge.merging.spec import METRIC, EvaluationFiles, MergingSpec
from raybge.merging.weight_search import MergeCandidate, Weights, best_candidate, search_weights
from raybge.merging.writing import write_merged
from raybge.util.errors import UserError
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.merging.alignment import AlignedModels


def run_weight_search(spec: MergingSpec, aligned: AlignedModels, console: Console) -> MergeWeights:
    """Evaluate merge candidates on the target set, and on the general set if there is one, and choose the best.

    Args:
        spec: the merge; its `search` is set.
        aligned: the source models.
        console: receives the plan and the progress.

    Returns:
        The best candidate's weights and all candidates; no weights on a dry run, which ends after the plan.

    Raises:
        UserError: the evaluation data is invalid, or a candidate cannot be written.
    """
    search = spec.search
    assert search is not None
    silent = Console()  # logs only: the evaluation of each candidate would print its plan
    with ExitStack() as stack:
        work = stack.enter_context(_work_folder(spec))
        target = stack.enter_context(_metric_on(search.target, spec, work, silent, console))
        general = search.general and stack.enter_context(_metric_on(search.general, spec, work, silent, console))
        if spec.dry_run:
            return MergeWeights([])
        bar = stack.enter_context(console.bar("search", search.max_evaluations, "candidate"))

        def evaluate(weights: Weights) -> MergeCandidate:
            folder = work / "candidate"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_merged(spec, aligned, folder, weights)
            return MergeCandidate(weights, target(str(folder)), general(str(folder)) if general else None)

        candidates: list[MergeCandidate] = []
        for candidate in search_weights(evaluate, len(spec.names), search.max_evaluations, search.general_floor):
            candidates.append(candidate)
            best = best_candidate(candidates, search.general_floor)
            bar.set_note(f"{METRIC} {best.target:.4f}")
            bar.update(1)
    return MergeWeights(list(best.weights), candidates=candidates)


@contextmanager
def _work_folder(spec: MergingSpec) -> Iterator[Path]:
    """Provide the folder of the candidates while a search runs; it is removed afterwards."""
    storage = spec.scale.storage_path
    parent = storage or (os.path.dirname(os.path.abspath(spec.output_path)) if spec.output_path else None)
    try:
        if parent:
            os.makedirs(parent, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".raybge-merge-", dir=parent)
    except OSError as error:
        flag = "--storage_path" if storage else "--output_path"
        raise UserError(f"{flag}: {parent} cannot be written ({error.strerror})") from error
    with folder as path:
        yield Path(path)


@contextmanager
def _metric_on(
    data: EvaluationFiles, spec: MergingSpec, work: Path, silent: Console, console: Console
) -> Iterator[Callable[[str], float]]:
    """Provide a function from a model's folder to its METRIC on `data`, valid within the `with` block."""
    from raybge.cli.options import EvaluateOptions
    from raybge.evaluation.retrieval import evaluate_model, open_data
    from raybge.evaluation.spec import EvaluationSpec, evaluation_encoder
    from raybge.search.store import Store

    for flag, paths in ((data.flag, data.queries), (f"{data.flag}_corpus", data.corpus)):
        if paths:
            list_files(paths, f"--{flag}")  # here, since evaluation would report its own flags
    corpus = list(data.corpus) or [_write_own_corpus(data, spec, work, console)]
    options = EvaluateOptions(
        model_name_or_path=spec.names[0],
        corpus_data=corpus,
        query_data=list(data.queries),
        k=10,
        storage_path=str(work / data.flag),
        num_workers=spec.scale.num_workers,
        use_gpu=spec.scale.use_gpu,
        cpus_per_worker=spec.scale.cpus_per_worker,
        address=spec.scale.address,
        on_bad_rows=spec.on_bad_rows,
        accept_any_text=spec.any_text,
        cache_dir=spec.cache_dir,
        trust_remote_code=spec.trust_remote_code,
    )
    evaluation = EvaluationSpec.from_options(options)
    with open_data(evaluation, silent) as judged:
        counts = judged.counts
        console.info(
            f"--{data.flag}: {plural(counts['queries'], 'query')}, {plural(counts['corpus'], 'passage')}; "
            f"{judged.cluster.describe()}"
        )

        def metric(model: str) -> float:
            store = Store(str(work / data.flag / "vectors"))
            try:
                encoder = evaluation_encoder(options, model)
                metrics = evaluate_model(evaluation, encoder, judged.with_store(store), silent)
                return float(metrics.summary[METRIC])
            finally:
                store.remove()

        yield metric


def _write_own_corpus(data: EvaluationFiles, spec: MergingSpec, work: Path, console: Console) -> str:
    """Write every `pos` and `neg` of the query rows as a corpus, and return its path."""
    from raybge.evaluation.validation_data import BLOCK_BYTES, parse_pool
    from raybge.search.search_data import passages_of_group

    files = list_files(data.queries, f"--{data.flag}", spec.any_text)
    counts = survey(files, BLOCK_BYTES, parse_pool, spec.on_bad_rows)
    if counts.bad_count:
        console.info(skipped_rows_message(counts, f"--{data.flag}"))
    path = work / f"{data.flag}-corpus.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for block in counts.blocks:
            for row in read_block(files, block, parse_pool):
                if isinstance(row, Row):
                    out.writelines(json.dumps({"text": text}) + "\n" for text in passages_of_group(row.value))
    return str(path)
