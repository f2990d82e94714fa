"""Cross-encoder scores on Ray: of mined candidates, or of groups that have their negatives already.

Scores are kept in the store by block, so that an interrupted run does not compute them again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.cluster.resources import Plan
from raybge.data.groups import parse_group
from raybge.data.ray_datasets import batches_of, to_dataset
from raybge.data.survey import Survey
from raybge.mining.relabelling import RelabelSpec, RelabelStatistics, relabel_by_scores
from raybge.model.model_identity import model_identity
from raybge.model.spec import RerankerSpec
from raybge.search.actor_pool import map_on_actors
from raybge.search.embedder import device_of
from raybge.search.store import Store
from raybge.util.digest import digest

_TOKENIZING, _SCORING = threading.Lock(), threading.Lock()
DECIMALS = 6  # of a written score: the last digits of float32 depend on the other pairs of a batch


@dataclass(frozen=True)
class CrossEncoderScorer:
    """Scores pairs of texts; the model is loaded where it is first needed.

    Args:
        model: the cross-encoder.
        identity: digest of everything that the scores depend on.
        store: keeps the scores.
        threads: threads of the process.
        device: torch device.
        normalize: apply the sigmoid.
    """

    model: RerankerSpec
    identity: str
    store: Store
    threads: int
    device: str
    normalize: bool = False

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the scores of N pairs (query, passage), (N,) float32."""
        name = digest("cross-encoder", self.identity, self.normalize, list(pairs))
        if not self.store.has(name):
            # One thread tokenizes while another one uses the GPU. A tokenizer cannot serve two threads at a time.
            with _TOKENIZING:
                model = _load_model(self.model, self.threads, self.device)
                tokens = model.tokenize(pairs)
            with _SCORING:
                score_N = model.score_tokens(tokens, self.normalize)
            self.store.write_arrays(name, score_N=np.asarray(score_N, np.float32))
        return self.store.arrays(name)["score_N"]


def make_scorer(model: RerankerSpec, normalize: bool, store: Store, plan: Plan) -> CrossEncoderScorer:
    """Return the scorer of a cross-encoder; its identity includes the device type, since a GPU computes other scores.

    Args:
        model: the cross-encoder.
        normalize: apply the sigmoid.
        store: keeps the scores.
        plan: workers and their resources.

    Returns:
        The scorer.
    """
    identity = digest(model_identity(model.model_name_or_path, model.cache_dir), model.keywords(), plan.gpus)
    return CrossEncoderScorer(model, identity, store, plan.cpus, device_of(plan), normalize)


@cache
def _load_model(model: RerankerSpec, threads: int, device: str) -> Any:
    """Load the model once per process."""
    import torch

    torch.set_num_threads(threads)
    return model.load(devices=device)


def rounded_scores(scores: Sequence[float] | np.ndarray) -> list[float]:
    """Return scores as they are written, with `DECIMALS` digits."""
    return [round(float(score), DECIMALS) for score in scores]


def score_groups(
    survey: Survey, scorer: CrossEncoderScorer, plan: Plan, relabel: RelabelSpec | None = None
) -> Generator[tuple[bytes, int, RelabelStatistics], None, None]:
    """Score the positives and negatives of all rows.

    Args:
        survey: blocks of groups.
        scorer: the cross-encoder.
        plan: workers and their resources.
        relabel: what becomes of negatives that the cross-encoder takes for positives.

    Yields:
        JSON lines with `pos_scores` and `neg_scores`, their number, and counts of the relabelling, for each block in
        order.
    """
    scored = map_on_actors(to_dataset(survey, parse_group), ScoringActor, (scorer, relabel), plan, len(survey.blocks))
    with unwrap_user_errors(), batches_of(scored) as batches:
        for table in batches:
            for result in table.to_pylist():
                yield result["lines"], result["rows"], RelabelStatistics(**json.loads(result["relabelling"]))


class ScoringActor:
    """Ray Data actor: adds the cross-encoder's scores to a block of rows."""

    def __init__(self, scorer: CrossEncoderScorer, relabel: RelabelSpec | None = None) -> None:
        """Remember the scorer.

        Args:
            scorer: the cross-encoder.
            relabel: what becomes of negatives that it takes for positives.
        """
        self._scorer, self._relabel = scorer, relabel

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score one block."""
        rows = [json.loads(text) for text in table["json"].to_pylist()]
        groups = [parse_group(row) for row in rows]
        score_N = self._scorer.scores([(group.query, text) for group in groups for text in (*group.pos, *group.neg)])
        start, lines, relabelling = 0, [], RelabelStatistics()
        for row, group in zip(rows, groups, strict=True):
            middle, end = start + len(group.pos), start + len(group.pos) + len(group.neg)
            row["pos_scores"] = rounded_scores(score_N[start:middle])
            row["neg_scores"] = rounded_scores(score_N[middle:end])
            start = end
            if self._relabel and group.neg:
                relabel_by_scores(row, self._relabel, relabelling)
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        counts = json.dumps(asdict(relabelling))
        return pa.table({"lines": [("".join(lines)).encode()], "rows": [len(rows)], "relabelling": [counts]})
