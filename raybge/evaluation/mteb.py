"""Tasks of MTEB (https://arxiv.org/abs/2210.07316), by the package `mteb`, with raybge's models.

    mteb.evaluate(MtebEncoder(raybge.Encoder("runs/mine")), mteb.get_tasks(["NFCorpus"]))
    python -m raybge.evaluate --encoder runs/mine --mteb_tasks NFCorpus SciFact

Letters in array names: N, M texts, D width of a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions
from raybge.cluster.remote_calls import results_in_order
from raybge.cluster.resources import Plan, plan_workers
from raybge.cluster.spec import ScaleSpec
from raybge.model.spec import EncoderSpec
from raybge.search.embedder import Embedder, TextEncoder, device_of, make_embedder
from raybge.search.inputs import InputSpec, open_inputs
from raybge.search.plan_lines import describe_model
from raybge.search.store import work_folder
from raybge.util import atomic_write as output
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder

BLOCK = 1024  # texts that an actor is given at a time


def evaluate_tasks(arguments: EvaluateOptions, options: dict[str, Any], console: Console) -> dict[str, float]:
    """`raybge.evaluate --mteb_tasks`: each task's main score, "NFCorpus/ndcg_at_10"; `options` are the Encoder's.

    With a `--storage_path` tasks that were measured before, by the same model, are not measured again.
    """
    tasks = find(arguments.mteb_tasks or [])
    inputs = InputSpec(
        [], written={"--metrics_file": arguments.metrics_file}, models={"--model_name_or_path": arguments.model_name_or_path}
    )
    scale = ScaleSpec.from_options(arguments)
    with work_folder(arguments.storage_path, "mteb") as work, open_inputs(inputs, scale, work, console) as (cluster, _):
        wanted = arguments.num_workers, arguments.use_gpu, arguments.cpus_per_worker
        plan = plan_workers(cluster, *wanted, cores_a_worker=1)
        console.info(f"cluster: {cluster.describe()}; {plan.describe('actor')}")
        console.info(describe_model(EncoderSpec(**options)))
        console.info(f"tasks: {', '.join(task.metadata.name for task in tasks)}")
        if arguments.dry_run:
            return {}
        embedder = make_embedder(EncoderSpec(**options), plan)
        name = f"raybge/{os.path.basename(options['model_name_or_path'].rstrip('/'))}"
        model = MtebEncoder(Actors(embedder, plan), name, embedder.identity)
        with console.bar("measure", len(tasks), "tasks") as bar:
            results = []
            for task in tasks:
                results.append(_measured(task, model, work if arguments.storage_path else None))
                bar.update(1)
    mains = [(task.metadata.name, task.metadata.main_score) for task in tasks]
    scores = [(*main, result.get_score()) for main, result in zip(mains, results, strict=True)]
    console.table(("task", "score", ""), [(name, score, f"{value:.4f}") for name, score, value in scores])
    found = {f"{name}/{score}": float(value) for name, score, value in scores}
    if path := arguments.metrics_file:
        whole = {**found, "tasks": [result.model_dump(mode="json") for result in results]}
        with output.open_atomic(path, "--metrics_file") as out:
            out.write((json.dumps(whole, indent=2) + "\n").encode())
        _write_page(arguments, path, tasks, results)
        console.info(f"written: {path}")
    return found


def _write_page(arguments: EvaluateOptions, path: str, tasks: Sequence[Any], results: Sequence[Any]) -> None:
    from raybge.cli.parser import changed_values
    from raybge.evaluation import mteb_page as report
    from raybge.report.page import write_or_log
    from raybge.report.run_details import RunDetails, library_versions
    from raybge.util.filesystem import append_to_path

    def about() -> report.MtebReport:
        shown = [
            report.MtebTask(
                name=task.metadata.name,
                kind=task.metadata.type,
                main=task.metadata.main_score,
                score=float(result.get_score()),
                parts=[(split, each["hf_subset"], each) for split, found in result.scores.items() for each in found],
                seconds=result.evaluation_time or 0.0,
            )
            for task, result in zip(tasks, results, strict=True)
        ]
        return report.MtebReport(
            RunDetails("evaluate", changed_values(arguments), arguments.model_name_or_path, versions=library_versions()), shown
        )

    write_or_log(report.write, append_to_path(path, ".report.html"), about)


def find(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names. UserError for one that it does not know, or without the package."""
    try:
        import mteb
    except ImportError:
        raise UserError("--mteb_tasks needs the package mteb: pip install 'raybge[mteb]'") from None
    found = []
    for name in names:
        try:
            found.append(mteb.get_task(name))
        except KeyError as error:
            raise UserError(f"--mteb_tasks: {str(error.args[0]).removeprefix('KeyError: ')}") from None
    return found


def _measured(task: Any, model: MtebEncoder, kept: str | None) -> Any:
    """What mteb finds for one task; `kept`: the folder of its results cache."""
    import mteb

    name = task.metadata.name
    cache = mteb.ResultCache(kept) if kept else None
    try:
        found = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    except OSError as error:  # what Hugging Face's libraries raise where data are not to be had
        raise UserError(f"--mteb_tasks: the data of {name} cannot be read: {error}") from error
    return next(result for result in found.task_results if result.task_name == name)


class MtebEncoder:
    """A model as `mteb.evaluate` takes it (mteb's EncoderProtocol): queries and documents get their own instructions
    and lengths, texts of symmetric tasks none.

    Args:
        encoder: whose vectors are measured; `Actors` encodes on a Ray cluster.
        name: what mteb's results call it, "organisation/model".
        revision: what mteb's cache tells models of one name apart by.
    """

    def __init__(self, encoder: Encoder | Actors, name: str = "raybge/encoder", revision: str | None = None) -> None:
        from mteb.models.model_meta import ModelMeta

        self._encoder = encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "embed_dim": encoder.dim, "framework": ["PyTorch"]}
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """(N, D) of batches of texts, as mteb deals them."""
        texts = [text for batch in inputs for text in batch["text"]]
        kind = getattr(prompt_type, "value", prompt_type)
        encoder = self._encoder
        encode = {"query": encoder.encode_queries, "document": encoder.encode_corpus, None: encoder.encode}[kind]
        return np.asarray(encode(texts))

    def similarity(self, a_ND: Any, b_MD: Any) -> Any:
        """(N, M) inner products, cosines where the model normalises."""
        import torch

        a_ND, b_MD = (torch.atleast_2d(torch.as_tensor(vectors)) for vectors in (a_ND, b_MD))
        return a_ND @ b_MD.T

    def similarity_pairwise(self, a_ND: Any, b_ND: Any) -> Any:
        """(N,) inner products of each with its own."""
        import torch

        return (torch.as_tensor(a_ND) * torch.as_tensor(b_ND)).sum(-1)


class Actors:
    """Encodes on the actors of a plan. What is encoded together is cut by the texts alone."""

    def __init__(self, embedder: Embedder, plan: Plan) -> None:
        import ray

        actor = ray.remote(_Actor).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
        self._actors = [actor.remote(embedder, device_of(plan)) for _ in range(plan.workers)]
        self.dim = embedder.dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(None, texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode("query", texts)

    def encode_corpus(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode("passage", texts)

    def _encode(self, kind: str | None, texts: Sequence[str]) -> np.ndarray:
        blocks = [list(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
        calls = [(self._actors[i % len(self._actors)].encode.remote, kind, block) for i, block in enumerate(blocks)]
        found = [*results_in_order(calls, 2 * len(self._actors))]
        return np.concatenate(found) if found else np.zeros((0, self.dim), np.float32)


class _Actor:
    def __init__(self, embedder: Embedder, device: str) -> None:
        self._texts = TextEncoder(embedder, device)

    def encode(self, kind: str | None, texts: list[str]) -> np.ndarray:
        return self._texts(texts, kind)
