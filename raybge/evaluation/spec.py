"""Specs of evaluation: read once from the options of a command."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.options import TrainOptions
from raybge.util.errors import UserError


@dataclass(frozen=True)
class ValidationSpec:
    """Queries and corpus of the evaluation while training.

    Args:
        queries: files, folders or globs of --eval_data.
        corpus: files, folders or globs of --eval_corpus; empty: every `pos` and `neg` of the queries.
        on_bad_rows: "stop" or "skip".
        query_max_len: longest query in tokens, special ones included.
        passage_max_len: longest passage in tokens, special ones included.
    """

    queries: tuple[str, ...]
    corpus: tuple[str, ...]
    on_bad_rows: str
    query_max_len: int
    passage_max_len: int

    @classmethod
    def from_options(cls, options: TrainOptions) -> ValidationSpec | None:
        """Read --eval_data and --eval_corpus; None without --eval_data.

        Raises:
            UserError: --eval_corpus without --eval_data.
        """
        if not options.eval_data:
            if options.eval_corpus:
                raise UserError("--eval_corpus is searched with the queries of --eval_data: give --eval_data too")
            return None
        return cls(
            tuple(options.eval_data),
            tuple(options.eval_corpus or ()),
            options.on_bad_rows,
            options.query_max_len,
            options.passage_max_len,
        )
