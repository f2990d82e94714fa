"""Tasks of MTEB (https://arxiv.org/abs/2210.07316) with raybge's models, by the package `mteb`.

    mteb.evaluate(MtebEncoder(raybge.Encoder("runs/mine")), mteb.get_tasks(["NFCorpus"]))
    python -m raybge.evaluate --encoder runs/mine --mteb_tasks NFCorpus SciFact

Letters in array names: N, M texts, D width of a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.cli.console import Console
from raybge.cluster.remote_calls import results_in_order
from raybge.cluster.resources import Plan
from raybge.evaluation import mteb_page
from raybge.evaluation.spec import EvaluationSpec
from raybge.model.spec import EncoderSpec
from raybge.report.page import REPORT, write_or_log
from raybge.report.run_details import RunDetails, library_versions
from raybge.search.embedder import Embedder, TextEncoder, device_of, make_embedder, with_export_dir
from raybge.search.inputs import InputSpec, open_inputs
from raybge.search.plan_lines import describe_model
from raybge.search.store import work_folder
from raybge.util.atomic_write import open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder

BLOCK = 1024  # texts per call of an actor


def evaluate_tasks(spec: EvaluationSpec, console: Console) -> dict[str, float]:
    """Run `raybge.evaluate --mteb_tasks`.

    With a storage path, tasks that the same model was evaluated on before are not evaluated again.

    Args:
        spec: the evaluation.
        console: prints the plan, the progress and the scores.

    Returns:
        Each task's main score, by a name such as "NFCorpus/ndcg_at_10"; empty on a dry run.

    Raises:
        UserError: an unknown task, or one whose data cannot be read.
    """
    tasks = find_tasks(spec.mteb_tasks)
    inputs = InputSpec(
        [],
        written={"--metrics_file": spec.metrics_file},
        models={"--model_name_or_path": spec.model.name},
        encoders=[spec.model.encoder],
    )
    storage = spec.scale.storage_path
    with work_folder(storage, "mteb") as work, ExitStack() as stack:
        encoder = with_export_dir(spec.model.encoder, work, storage)
        exports = [] if spec.dry_run else [encoder]
        cluster, _ = stack.enter_context(open_inputs(inputs, spec.scale, work, console, exports))
        plan = spec.scale.plan(cluster, cores_a_worker=1)
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        console.info(describe_model(spec.model.encoder))
        console.info(f"tasks: {', '.join(task.metadata.name for task in tasks)}")
        if dropping := [name for name, drops in _drop_settings(tasks).items() if drops]:
            console.info(f"hits that are the query itself are dropped (ignore_identical_ids): {', '.join(dropping)}")
        if spec.dry_run:
            return {}
        model = _model_on_actors(encoder, plan)
        results = []
        with console.bar("evaluate", len(tasks), "task") as bar:
            for task in tasks:
                results.append(_evaluate_task(task, model, work if storage else None))
                bar.update(1)
    scores = {(task.metadata.name, task.metadata.main_score): float(result.get_score())
              for task, result in zip(tasks, results, strict=True)}  # fmt: skip
    console.table(("task", "score", ""), [(*names, f"{value:.4f}") for names, value in scores.items()])
    metrics = {f"{task}/{score}": value for (task, score), value in scores.items()}
    if spec.metrics_file:
        _write_results(spec, spec.metrics_file, metrics, tasks, results)
        console.info(f"written: {spec.metrics_file}")
    return metrics


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Return mteb's tasks of these names.

    Args:
        names: names of tasks.

    Returns:
        The tasks, in the same order.

    Raises:
        UserError: an unknown name, or mteb is not installed.
    """
    try:
        import mteb
    except ImportError:
        raise UserError("--mteb_tasks requires the package mteb: pip install 'raybge[mteb]'") from None
    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            raise UserError(f"--mteb_tasks: {str(error.args[0]).removeprefix('KeyError: ')}") from None
    return tasks


def _drop_settings(tasks: Sequence[Any]) -> dict[str, bool]:
    """Return, for each retrieval task, its setting to drop the hit that has the query's id; mteb itself applies it."""
    return {task.metadata.name: task.ignore_identical_ids for task in tasks if hasattr(task, "ignore_identical_ids")}


def _model_on_actors(encoder: EncoderSpec, plan: Plan) -> MtebEncoder:
    embedder = make_embedder(encoder, plan)
    name = f"raybge/{os.path.basename(encoder.model_name_or_path.rstrip('/'))}"
    return MtebEncoder(ActorEncoder(embedder, plan), name, embedder.identity)


def _evaluate_task(task: Any, model: MtebEncoder, cache_folder: str | None) -> Any:
    """Return mteb's result of one task, from its results cache if there is a folder for it."""
    import mteb

    name = task.metadata.name
    cache = mteb.ResultCache(cache_folder) if cache_folder else None
    try:
        results = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    except OSError as error:  # raised by Hugging Face's libraries if data is not available
        raise UserError(f"--mteb_tasks: the data of {name} cannot be read: {error}") from error
    return next(result for result in results.task_results if result.task_name == name)


def _write_results(
    spec: EvaluationSpec, path: str, metrics: Mapping[str, float], tasks: Sequence[Any], results: Sequence[Any]
) -> None:
    """Write the main scores with mteb's complete results and, next to them, the report page."""
    values = {
        **metrics,
        "ignore_identical_ids": _drop_settings(tasks),
        "tasks": [result.model_dump(mode="json") for result in results],
    }
    with open_atomic(path, "--metrics_file") as out:
        out.write((json.dumps(values, indent=2) + "\n").encode())
    report_path = append_to_path(path, f".{REPORT}")
    write_or_log(mteb_page.write, report_path, lambda: _report(spec, tasks, results))


def _report(spec: EvaluationSpec, tasks: Sequence[Any], results: Sequence[Any]) -> mteb_page.MtebReport:
    return mteb_page.MtebReport(
        RunDetails("evaluate", spec.flags, spec.model.name, versions=library_versions()),
        [
            mteb_page.MtebTask(
                name=task.metadata.name,
                kind=task.metadata.type,
                main=task.metadata.main_score,
                score=float(result.get_score()),
                parts=[(split, each["hf_subset"], each) for split, parts in result.scores.items() for each in parts],
                seconds=result.evaluation_time or 0.0,
            )
            for task, result in zip(tasks, results, strict=True)
        ],
    )


class MtebEncoder:
    """Model with mteb's EncoderProtocol, for `mteb.evaluate`.

    Queries and documents get their own instructions and lengths, texts of symmetric tasks none.

    Args:
        encoder: makes the vectors; an `ActorEncoder` encodes on a Ray cluster.
        name: name in mteb's results, "organization/model".
        revision: distinguishes models of the same name in mteb's cache.
    """

    def __init__(
        self, encoder: Encoder | ActorEncoder, name: str = "raybge/encoder", revision: str | None = None
    ) -> None:
        from mteb.models.model_meta import ModelMeta

        self._encoder = encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "embed_dim": encoder.dim, "framework": ["PyTorch"]}
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
        """Encode batches of texts.

        Args:
            inputs: mteb's batches, with the key "text".
            prompt_type: mteb's PromptType; None for symmetric tasks.
            **kwargs: further arguments of the protocol, ignored.

        Returns:
            Vectors (N, D) of the texts of all batches.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        kind = getattr(prompt_type, "value", prompt_type)
        encoder = self._encoder
        encode = {"query": encoder.encode_queries, "document": encoder.encode_corpus, None: encoder.encode}[kind]
        return np.asarray(encode(texts))

    def similarity(self, a_ND: Any, b_MD: Any) -> Any:
        """Return the (N, M) inner products: cosines if the model normalizes."""
        import torch

        a_ND, b_MD = (torch.atleast_2d(torch.as_tensor(vectors)) for vectors in (a_ND, b_MD))
        return a_ND @ b_MD.T

    def similarity_pairwise(self, a_ND: Any, b_ND: Any) -> Any:
        """Return the (N,) inner products of the rows of `a_ND` with the same rows of `b_ND`."""
        import torch

        return (torch.as_tensor(a_ND) * torch.as_tensor(b_ND)).sum(-1)


class ActorEncoder:
    """Encoder on Ray actors. Texts are cut into blocks by their order alone, so results do not depend on the plan.

    Args:
        embedder: the model.
        plan: number and resources of the actors.
    """

    def __init__(self, embedder: Embedder, plan: Plan) -> None:
        import ray

        actor = ray.remote(_EncodingActor).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
        self._actors = [actor.remote(embedder, device_of(plan)) for _ in range(plan.workers)]
        self.dim = embedder.dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts without an instruction, (N, D)."""
        return self._encode(None, texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Encode queries, (N, D)."""
        return self._encode("query", texts)

    def encode_corpus(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages, (N, D)."""
        return self._encode("passage", texts)

    def _encode(self, kind: str | None, texts: Sequence[str]) -> np.ndarray:
        blocks = [list(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        calls = [(self._actors[i % len(self._actors)].encode.remote, kind, block) for i, block in enumerate(blocks)]
        vectors = [*results_in_order(calls, 2 * len(self._actors))]
        return np.concatenate(vectors) if vectors else np.zeros((0, self.dim), np.float32)


class _EncodingActor:
    def __init__(self, embedder: Embedder, device: str) -> None:
        self._encoder = TextEncoder(embedder, device)

    def encode(self, kind: str | None, texts: list[str]) -> np.ndarray:
        return self._encoder(texts, kind)
