"""A cross-encoder's scores on Ray: of what is mined, or of groups that have their negatives already.

Scores are kept in the store by block, so that a run that was killed does not compute them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cluster.remote_calls import unwrapped
from raybge.cluster.resources import Plan
from raybge.data.groups import parse_group
from raybge.data.ray_datasets import to_dataset
from raybge.data.survey import Survey
from raybge.search.store import Store, digest

DECIMALS = 6  # of a written score: the last digits of float32 depend on what else is in a batch


@dataclass(frozen=True)
class Teacher:
    """Scores pairs of texts; its model is loaded where it is first needed.

    Args:
        options: of a Reranker, with `model_name_or_path` first of all.
        identity: changes when the scores would.
        threads, gpu: what it may use.
    """

    options: tuple[tuple[str, Any], ...]
    identity: str
    store: Store
    threads: int
    gpu: bool
    normalize: bool = False

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(N,) float32 for N pairs (query, passage)."""
        name = digest("teacher", self.identity, self.normalize, list(pairs))
        if not self.store.has(name):
            score_N = _reranker(self.options, self.threads, self.gpu).compute_score(pairs, normalize=self.normalize)
            self.store.write_arrays(name, score_N=np.asarray(score_N, np.float32))
        return self.store.arrays(name)["score_N"]


@cache
def _reranker(options: tuple[tuple[str, Any], ...], threads: int, gpu: bool) -> Any:
    """One a process."""
    import torch

    from raybge.model.reranker import Reranker

    torch.set_num_threads(threads)
    return Reranker(**dict(options), devices="cuda:0" if gpu else "cpu")


def written(scores: Sequence[float] | np.ndarray) -> list[float]:
    """Scores as they are written."""
    return [round(float(score), DECIMALS) for score in scores]


def rescore(survey: Survey, teacher: Teacher, plan: Plan) -> Iterator[tuple[bytes, int]]:
    """The rows of the survey with the teacher's `pos_scores` and `neg_scores`: lines and rows, block by block."""
    import ray

    scored = to_dataset(survey, parse_group).map_batches(
        _Rescore,
        fn_constructor_args=(teacher,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(survey.blocks))),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
    )
    with unwrapped():
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for done in table.to_pylist():
                yield done["lines"], done["rows"]


class _Rescore:
    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [json.loads(text) for text in table["json"].to_pylist()]
        groups = [parse_group(row) for row in rows]
        score_N = self._teacher.scores([(group.query, text) for group in groups for text in (*group.pos, *group.neg)])
        at, lines = 0, []
        for row, group in zip(rows, groups, strict=True):
            middle, end = at + len(group.pos), at + len(group.pos) + len(group.neg)
            row["pos_scores"], row["neg_scores"] = written(score_N[at:middle]), written(score_N[middle:end])
            at = end
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        return pa.table({"lines": [("".join(lines)).encode()], "rows": [len(rows)]})
