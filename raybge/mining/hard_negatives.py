"""Negatives of one block of rows, from the search hits of the block, and their statistics.

Letters in array names: Q rows, K ranks, C candidates of a row, P positives of a row, N passages or pairs of all rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raybge.data.groups import Group, parse_group
from raybge.mining.cross_encoder import CrossEncoderScorer, rounded_scores
from raybge.mining.relabelling import RelabelSpec, RelabelStatistics, relabel_by_scores
from raybge.mining.rescoring import Rescorer, changed_ranks
from raybge.mining.sampling import RowCandidates, SampledNegatives, SamplingSpec, sample
from raybge.mining.statistics import EXAMPLES, MiningStatistics, bin_numbers
from raybge.search.columns import keys_of, vectors_of
from raybge.search.index import PassageLookup, SearchHits


@dataclass(frozen=True)
class MinedBlock:
    """Output lines of one block, and their statistics."""

    lines: bytes
    statistics: MiningStatistics


def excluded_texts(group: Group) -> Sequence[str]:
    """Return the texts that are never negatives of a row, the positives first."""
    return (*group.pos, group.query)


def mine_block(
    hits: SearchHits,
    lookup: PassageLookup,
    sampling: SamplingSpec,
    scorer: CrossEncoderScorer | None,
    keep_scores: bool,
    rescorer: Rescorer | None = None,
    relabel: RelabelSpec | None = None,
) -> MinedBlock:
    """Choose the negatives of each row of a block. A row's random seed is its position in the input.

    Args:
        hits: search result of the block.
        lookup: texts and scores of passages.
        sampling: rules and choice.
        scorer: cross-encoder whose scores replace the embedding model's and are written.
        keep_scores: write the embedding model's scores.
        rescorer: scores of the embedding model in fp32, which replace those of `hits`.
        relabel: what becomes of negatives that the cross-encoder takes for positives.

    Returns:
        The rows with their negatives.
    """
    raws = [json.loads(text) for text in hits.table["text"].to_pylist()]
    groups = [parse_group(raw) for raw in raws]
    first_QK = hits.ids_QK
    hits = rescorer.rescored(hits, sampling.hi) if rescorer else hits
    scores = _BlockScores(hits, groups, lookup, scorer, rescorer)
    positives = scores.of_positives()
    rows = [row.without_excluded() for row in _row_candidates(hits, sampling, positives)]
    if scorer and (sampling.by_score or sampling.strategy == "top"):
        rows = scores.rescored(rows)
    sampled = sample(rows, sampling, lookup.passages, scores.of_passages)
    counts = [len(each.ids) for each in sampled]
    ids_N = np.concatenate([each.ids for each in sampled])
    texts = lookup.texts(ids_N)
    negatives = _split(_negative_scores(rows, sampled, scores, scorer, keep_scores), counts)
    lines, relabelling = [], RelabelStatistics()
    for raw, ids, score, positive in zip(raws, _split(ids_N, counts), negatives, positives, strict=True):
        raw["neg"] = [texts[i] for i in ids.tolist()]
        raw.pop("neg_scores", None)  # scores of the input's negatives
        if keep_scores or scorer:
            raw["pos_scores"], raw["neg_scores"] = rounded_scores(positive), rounded_scores(score)
        if scorer and relabel:
            relabel_by_scores(raw, relabel, relabelling)
        lines.append(json.dumps(raw, ensure_ascii=False) + "\n")
    statistics = _block_statistics(hits, groups, sampled, positives, negatives, sampling)
    statistics.compare(
        [(group.query, group.pos) for group in groups], positives, negatives, [each.ids for each in sampled], texts
    )
    if rescorer:
        cut = slice(sampling.lo, sampling.hi)
        statistics.ranks_changed, statistics.ranks_rescored = changed_ranks(first_QK[:, cut], hits.ids_QK[:, cut])
    statistics.examples = [
        {"query": group.query, "pos": group.pos[0], "neg": raw["neg"][:1]}
        for group, raw in zip(groups[:EXAMPLES], raws[:EXAMPLES], strict=True)
    ]
    statistics.relabelling = relabelling
    return MinedBlock("".join(lines).encode(), statistics)


def _block_statistics(
    hits: SearchHits,
    groups: Sequence[Group],
    sampled: Sequence[SampledNegatives],
    positives: Sequence[np.ndarray],
    negatives: Sequence[np.ndarray],
    sampling: SamplingSpec,
) -> MiningStatistics:
    """Return counts, ranks and histograms of a block."""
    statistics = MiningStatistics(rows=len(groups))
    for positive_P, negative_N in zip(positives, negatives, strict=True):
        statistics.positives.update(bin_numbers(positive_P))
        statistics.negatives.update(bin_numbers(negative_N))
    statistics.counts.update(len(each.ids) for each in sampled)
    for each, ids_K in zip(sampled, hits.ids_QK, strict=True):
        statistics.ranks.update(np.nonzero(ids_K == each.ids[: len(each.ids) - each.fills, None])[1].tolist())
    statistics.rows_filled = sum(each.fills > 0 for each in sampled)
    statistics.rows_with_fewer = sum(len(each.ids) < sampling.number for each in sampled)
    return statistics


def _negative_scores(
    rows: Sequence[RowCandidates],
    sampled: Sequence[SampledNegatives],
    scores: _BlockScores,
    scorer: CrossEncoderScorer | None,
    keep_scores: bool,
) -> np.ndarray:
    """Return the scores of all sampled negatives, (N,); nan for random passages whose score is not written."""
    score_N = np.concatenate([_candidate_scores(row, each.ids) for row, each in zip(rows, sampled, strict=True)])
    unknown_N = np.isnan(score_N) if not scorer else np.ones(len(score_N), bool)
    if (keep_scores or scorer) and unknown_N.any():
        row_N = np.repeat(np.arange(len(rows)), [len(each.ids) for each in sampled])
        ids_N = np.concatenate([each.ids for each in sampled])
        score_N[unknown_N] = scores.of_passages(row_N[unknown_N], ids_N[unknown_N])
    return score_N


def _candidate_scores(row: RowCandidates, ids: np.ndarray) -> np.ndarray:
    """Return the scores of passages that are candidates of a row; nan for others."""
    by_id = dict(zip(row.ids_C.tolist(), row.score_C.tolist(), strict=True))
    return np.array([by_id.get(i, np.nan) for i in ids.tolist()], np.float32)


def _row_candidates(
    hits: SearchHits, sampling: SamplingSpec, positives: Sequence[np.ndarray]
) -> Iterator[RowCandidates]:
    _, counts = keys_of(hits.table)
    known = hits.known
    edges = np.searchsorted(known.key_M, np.concatenate([[0], np.cumsum(counts)]))
    places = zip(hits.table["file"].to_pylist(), hits.table["offset"].to_pylist(), strict=True)
    for row, (place, positive_P) in enumerate(zip(places, positives, strict=True)):
        # the range is cut out of the full ranking first; excluded passages are dropped afterwards
        cut = slice(sampling.lo, sampling.hi)
        excluded_B = known.id_M[edges[row] : edges[row + 1]]
        rng = np.random.default_rng([sampling.seed, *place])
        yield RowCandidates(hits.ids_QK[row, cut], hits.scores_QK[row, cut], excluded_B, positive_P, rng)


class _BlockScores:
    """Scores of a block's rows with passages: the embedding model's, or the cross-encoder's."""

    def __init__(
        self,
        hits: SearchHits,
        groups: Sequence[Group],
        lookup: PassageLookup,
        scorer: CrossEncoderScorer | None,
        rescorer: Rescorer | None,
    ) -> None:
        self._hits, self._groups, self._lookup = hits, groups, lookup
        self._scorer, self._rescorer = scorer, rescorer

    def of_positives(self) -> list[np.ndarray]:
        """Return positive_P of each row; the embedding model's is nan if the pool lacks the passage."""
        counts = [len(group.pos) for group in self._groups]
        if self._scorer:
            pairs = [(group.query, text) for group in self._groups for text in group.pos]
            return _split(self._scorer.scores(pairs), counts)
        if "pos_scores" in self._hits.table.column_names:
            return _split(np.array(self._hits.table["pos_scores"].combine_chunks().flatten()), counts)
        _, keys = keys_of(self._hits.table)
        first_Q = np.cumsum(keys) - keys  # the keys of a row begin with its positives'
        places = [np.arange(first, first + count) for first, count in zip(first_Q, counts, strict=True)]
        texts = [text for group in self._groups for text in group.pos]
        return _split(self._known_scores(np.concatenate(places), texts), counts)

    def _known_scores(self, key_N: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Return the scores of known passages by key position; nan if the pool has no passage of the key."""
        known = self._hits.known
        start_N = np.searchsorted(known.key_M, key_N, side="left")
        stop_N = np.searchsorted(known.key_M, key_N, side="right")
        score_N = np.full(len(key_N), np.nan, np.float32)
        score_N[start_N < stop_N] = known.score_M[start_N[start_N < stop_N]]
        # a key stands for all spellings of a text: of several, the exact one is preferred
        several = np.flatnonzero(stop_N - start_N > 1).tolist()
        matches = [np.arange(start_N[n], stop_N[n]) for n in several]
        spellings: Any = self._lookup.texts(known.id_M[np.concatenate(matches)]) if several else {}
        for n, places in zip(several, matches, strict=True):
            same = [at for at in places if spellings[int(known.id_M[at])] == texts[n]]
            score_N[n] = known.score_M[same[0]] if same else known.score_M[places].max()
        return score_N

    def of_passages(self, row_N: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """Return the score of each passage for its row, (N,) float32."""
        if self._scorer:
            texts = self._lookup.texts(ids_N)
            pairs = [(self._groups[r].query, texts[i]) for r, i in zip(row_N.tolist(), ids_N.tolist(), strict=True)]
            return self._scorer.scores(pairs)
        q_ND = vectors_of(self._hits.table)[row_N]
        return self._rescorer.scores(self._lookup, q_ND, ids_N) if self._rescorer else self._lookup.scores(q_ND, ids_N)

    def rescored(self, rows: Sequence[RowCandidates]) -> list[RowCandidates]:
        """Return the rows with the cross-encoder's scores of their candidates."""
        counts = [len(row.ids_C) for row in rows]
        row_N = np.repeat(np.arange(len(rows)), counts)
        score_N = self.of_passages(row_N, np.concatenate([row.ids_C for row in rows]))
        return [replace(row, score_C=score_C) for row, score_C in zip(rows, _split(score_N, counts), strict=True)]


def _split(values_N: np.ndarray, counts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    return np.split(values_N, np.cumsum(counts)[:-1])
