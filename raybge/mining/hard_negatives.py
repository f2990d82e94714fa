"""The negatives of one block of rows, from what a search found for it, and what is counted of them.

Letters in array names: Q rows, K ranks, C candidates of a row, P positives of a row, N passages or pairs of all rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raybge.data.groups import Group, parse_group
from raybge.mining.cross_encoder import Teacher, written
from raybge.mining.sampling import Drawn, Row, Sampling, sample
from raybge.mining.statistics import EXAMPLES, Tally, bins
from raybge.search.index import Found, Lookup
from raybge.search.shards import keys_of, vectors_of


@dataclass(frozen=True)
class Sampled:
    """Output lines of one block, and what was counted."""

    lines: bytes
    tally: Tally


def not_negatives(group: Group) -> Sequence[str]:
    """The texts that are never a row's negatives, the positives first."""
    return (*group.pos, group.query)


def sampled(found: Found, lookup: Lookup, sampling: Sampling, teacher: Teacher | None, keep_scores: bool) -> Sampled:
    """Choose the negatives of each row of a block. A row's seed is its own place in the input.

    With a teacher its scores decide, and are written; else the embedding model's.
    """
    raws = [json.loads(text) for text in found.table["text"].to_pylist()]
    groups = [parse_group(raw) for raw in raws]
    scores = _Scores(found, groups, lookup, teacher)
    positives = scores.of_positives()
    rows = [row.free() for row in _rows(found, sampling, positives)]
    if teacher and (sampling.by_score or sampling.strategy == "top"):
        rows = scores.judged(rows)
    drawn = sample(rows, sampling, lookup.passages, scores.of_passages)
    counts = [len(each.ids) for each in drawn]
    ids_N = np.concatenate([each.ids for each in drawn])
    texts = lookup.texts(ids_N)
    score_N = _written_scores(rows, drawn, scores, teacher, keep_scores)
    tally = Tally(rows=len(raws))
    lines = []
    for raw, ids, score, positive in zip(raws, _split(ids_N, counts), _split(score_N, counts), positives, strict=True):
        raw["neg"] = [texts[i] for i in ids.tolist()]
        raw.pop("neg_scores", None)  # of other negatives
        if keep_scores or teacher:
            raw["pos_scores"], raw["neg_scores"] = written(positive), written(score)
        lines.append(json.dumps(raw, ensure_ascii=False) + "\n")
        tally.positives.update(bins(positive))
        tally.negatives.update(bins(score))
    tally.counts.update(counts)
    for each, ids_K in zip(drawn, found.ids_QK, strict=True):
        tally.ranks.update(np.nonzero(ids_K == each.ids[: len(each.ids) - each.fills, None])[1].tolist())
    about = [(group.query, group.pos) for group in groups]
    tally.compare(about, positives, _split(score_N, counts), [each.ids for each in drawn], texts)
    tally.filled = sum(each.fills > 0 for each in drawn)
    tally.short = sum(len(each.ids) < sampling.number for each in drawn)
    tally.examples = [
        {"query": group.query, "pos": group.pos[0], "neg": [texts[i] for i in each.ids[:1].tolist()]}
        for group, each in zip(groups[:EXAMPLES], drawn[:EXAMPLES], strict=True)
    ]
    return Sampled("".join(lines).encode(), tally)


def _written_scores(
    rows: Sequence[Row], drawn: Sequence[Drawn], scores: _Scores, teacher: Teacher | None, keep_scores: bool
) -> np.ndarray:
    """The scores of the drawn passages, one row after the other; nan of random ones where nobody asks for them."""
    score_N = np.concatenate([_score_of(row, each.ids) for row, each in zip(rows, drawn, strict=True)])
    open_N = np.isnan(score_N) if not teacher else np.ones(len(score_N), bool)
    if (keep_scores or teacher) and open_N.any():
        row_N = np.repeat(np.arange(len(rows)), [len(each.ids) for each in drawn])
        ids_N = np.concatenate([each.ids for each in drawn])
        score_N[open_N] = scores.of_passages(row_N[open_N], ids_N[open_N])
    return score_N


def _score_of(row: Row, ids: np.ndarray) -> np.ndarray:
    """The scores of some of a row's candidates; nan for other passages."""
    known = dict(zip(row.ids_C.tolist(), row.score_C.tolist(), strict=True))
    return np.array([known.get(i, np.nan) for i in ids.tolist()], np.float32)


def _rows(found: Found, sampling: Sampling, positives: Sequence[np.ndarray]) -> Iterator[Row]:
    _, counts = keys_of(found.table)
    known = found.known
    edges = np.searchsorted(known.key_M, np.concatenate([[0], np.cumsum(counts)]))
    places = zip(found.table["file"].to_pylist(), found.table["offset"].to_pylist(), strict=True)
    for row, (place, positive_P) in enumerate(zip(places, positives, strict=True)):
        # the range is cut out of the full ranking first, what must not be in it is dropped afterwards
        cut = slice(sampling.lo, sampling.hi)
        banned_B = known.id_M[edges[row] : edges[row + 1]]
        rng = np.random.default_rng([sampling.seed, *place])
        yield Row(found.ids_QK[row, cut], found.scores_QK[row, cut], banned_B, positive_P, rng)


class _Scores:
    """Scores of a block's rows with passages: the embedding model's, or the teacher's."""

    def __init__(self, found: Found, groups: Sequence[Group], lookup: Lookup, teacher: Teacher | None) -> None:
        self._found, self._groups, self._lookup, self._teacher = found, groups, lookup, teacher

    def of_positives(self) -> list[np.ndarray]:
        """positive_P of each row; the embedding model's are nan where the pool lacks the passage."""
        counts = [len(group.pos) for group in self._groups]
        if self._teacher:
            pairs = [(group.query, text) for group in self._groups for text in group.pos]
            return _split(self._teacher.scores(pairs), counts)
        if "pos_scores" in self._found.table.column_names:
            return _split(np.array(self._found.table["pos_scores"].combine_chunks().flatten()), counts)
        _, keys = keys_of(self._found.table)
        first_Q = np.cumsum(keys) - keys  # of each row's keys its positives' come first
        places = [np.arange(first, first + count) for first, count in zip(first_Q, counts, strict=True)]
        texts = [text for group in self._groups for text in group.pos]
        return _split(self._known_scores(np.concatenate(places), texts), counts)

    def _known_scores(self, place_N: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """The scores of known passages by the places of their keys; nan where the pool has none of a key."""
        known = self._found.known
        start_N, stop_N = (np.searchsorted(known.key_M, place_N, side=side) for side in ("left", "right"))
        score_N = np.full(len(place_N), np.nan, np.float32)
        score_N[start_N < stop_N] = known.score_M[start_N[start_N < stop_N]]
        # a key stands for all spellings: where there are several, the passage itself counts
        several = np.flatnonzero(stop_N - start_N > 1).tolist()
        spelled = [np.arange(start_N[n], stop_N[n]) for n in several]
        found = self._lookup.texts(known.id_M[np.concatenate(spelled)]) if several else {}
        for n, places in zip(several, spelled, strict=True):
            same = [at for at in places if found[int(known.id_M[at])] == texts[n]]
            score_N[n] = known.score_M[same[0]] if same else known.score_M[places].max()
        return score_N

    def of_passages(self, row_N: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        if self._teacher:
            texts = self._lookup.texts(ids_N)
            pairs = [(self._groups[r].query, texts[i]) for r, i in zip(row_N.tolist(), ids_N.tolist(), strict=True)]
            return self._teacher.scores(pairs)
        return self._lookup.scores(vectors_of(self._found.table)[row_N], ids_N)

    def judged(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the teacher's scores of their candidates."""
        counts = [len(row.ids_C) for row in rows]
        row_N = np.repeat(np.arange(len(rows)), counts)
        score_N = self.of_passages(row_N, np.concatenate([row.ids_C for row in rows]))
        return [
            Row(row.ids_C, score_C, row.banned_B, row.positive_P, row.rng)
            for row, score_C in zip(rows, _split(score_N, counts), strict=True)
        ]


def _split(values_N: np.ndarray, counts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    return np.split(values_N, np.cumsum(counts)[:-1])
