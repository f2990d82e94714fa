"""Data of a search: the pool of passages and the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybge.data.groups import Group, text_key
from raybge.data.jsonl import Parse
from raybge.data.survey import Survey
from raybge.search.deduplication import Key, SharedPositives, TextsOfRow, UniquePassages


@dataclass(frozen=True)
class Passages:
    """Pool of passages before deduplication.

    Args:
        survey: blocks of the files.
        parse: parser of a row.
        texts: returns the passages of a parsed row.
        key: hash by which queries refer to a passage.
    """

    survey: Survey
    parse: Parse
    texts: TextsOfRow
    key: Key = text_key


@dataclass(frozen=True)
class Queries:
    """Queries of a search.

    Args:
        survey: blocks of the files.
        parse: parser of a row, to a Group.
        known: returns the texts of a group whose passages a search reports besides the candidates.
        key: hash by which these texts are found in the pool.
        shared_positives: more such keys, from other rows of the same query.
        encode_positives: also compute the inner products of the positives with their query.
    """

    survey: Survey
    parse: Parse
    known: Callable[[Group], Sequence[str]]
    key: Key = text_key
    shared_positives: SharedPositives | None = None
    encode_positives: bool = False


@dataclass(frozen=True)
class SearchData:
    """Pool, its distinct passages, and queries."""

    passages: Passages
    unique: UniquePassages
    queries: Queries

    @property
    def texts(self) -> int:
        """Number of texts to encode: distinct passages and queries."""
        return self.unique.passages + self.queries.survey.total_rows


def single_passage(text: str) -> Sequence[str]:
    """Return the only passage of a row that is a passage."""
    return (text,)


def passages_of_group(group: Group) -> Sequence[str]:
    """Return the passages of a group: positives, then negatives."""
    return group.pos + group.neg
