"""Queries and corpus of evaluation in training (--eval_data, --eval_corpus), checked once in the driver.

This module imports no torch, so the driver starts without it; `in_training` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raybge.data.groups import Group, parse_group, parse_judged, parse_passage
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import Survey, skipped_rows_message, survey
from raybge.data.transcode import UNPACK, transcode
from raybge.evaluation.spec import ValidationSpec
from raybge.search.search_data import passages_of_group
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER

BLOCK_BYTES = 128 << 10  # of the input: about 30,000 tokens, enough to sort by length, few enough to share out evenly


@dataclass(frozen=True)
class ValidationData:
    """Queries and corpus, prepared by the driver and read by the workers.

    Args:
        queries: The queries.
        corpus: The passages; None: every `pos` and `neg` of the queries.
        query_max_len: Longest query in tokens, special ones included.
        passage_max_len: Longest passage in tokens, special ones included.
    """

    queries: Survey
    corpus: Survey | None
    query_max_len: int
    passage_max_len: int

    def groups(self, block: int) -> list[Group]:
        """Read the queries of a block."""
        return _read_values(self.queries, block, parse_pool if self.corpus is None else parse_judged)

    def passages(self, block: int) -> list[str]:
        """Read the passages of a block of the corpus, duplicates included."""
        if self.corpus is None:
            return [text for group in self.groups(block) for text in passages_of_group(group)]
        return _read_values(self.corpus, block, parse_passage)

    def lines(self) -> list[str]:
        """Describe the data for the plan, and list the rows that are skipped."""
        rows = "every `pos` and `neg` of them" if self.corpus is None else f"{self.corpus.total_rows:,} passages"
        lines = [f"evaluation: {self.queries.total_rows:,} queries searched in {rows}"]
        for flag, each in (("--eval_data", self.queries), ("--eval_corpus", self.corpus)):
            if each is not None and each.bad_count:
                lines.append(skipped_rows_message(each, flag))
        return lines


def prepare(spec: ValidationSpec | None, storage: Path) -> ValidationData | None:
    """Read --eval_data and --eval_corpus once and check every row.

    Compressed and other files that cannot be read from the middle are written as plain JSON lines below `storage`.
    Above 64 MiB, reading is distributed over Ray if this process is connected.

    Args:
        spec: The files and lengths; None without --eval_data.
        storage: Folder that all workers share.

    Returns:
        The data; None without --eval_data.

    Raises:
        UserError: If a file or row cannot be used.
    """
    if spec is None:
        return None
    hidden = storage / STATE_FOLDER

    def read(paths: Sequence[str], flag: str, parse: Parse) -> Survey:
        files = transcode(list_files(paths, flag, spec.any_text), str(hidden / "data"), tuple(UNPACK))
        return survey(files, BLOCK_BYTES, parse, spec.on_bad_rows, str(hidden))

    return ValidationData(
        queries=read(spec.queries, "--eval_data", parse_judged if spec.corpus else parse_pool),
        corpus=read(spec.corpus, "--eval_corpus", parse_passage) if spec.corpus else None,
        query_max_len=spec.query_max_len,
        passage_max_len=spec.passage_max_len,
    )


def parse_pool(raw: dict[str, Any]) -> Group:
    """Parse a judged query with its negatives, which are part of the corpus if there is no separate one."""
    judged = parse_judged(raw)
    return replace(judged, neg=parse_group({**raw, "pos": list(judged.pos)}).neg)


def _read_values(source: Survey, block: int, parse: Parse) -> list[Any]:
    """Read and parse the rows of a block; raise a UserError if the file changed after it was surveyed."""
    rows = read_block(source.files, source.blocks[block], parse)
    values = [row.value for row in rows if isinstance(row, Row)]
    if len(values) != source.rows[block]:
        raise UserError(f"{source.files[source.blocks[block].file].name} changed during the run")
    return values
