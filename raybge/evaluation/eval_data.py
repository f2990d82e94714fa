"""What is searched for in what while a model trains: --eval_data and --eval_corpus, checked once in the driver.

It knows nothing of torch, so that a driver need not load it; `validation.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raybge.cli.options import TrainOptions
from raybge.data.groups import Group, parse_group, parse_judged, parse_passage
from raybge.data.jsonl import Parse, Row, read_block
from raybge.data.ray_datasets import transcode
from raybge.data.source_files import list_files
from raybge.data.survey import Survey, named, survey
from raybge.search.pipeline import passages_of_group
from raybge.util.errors import UserError

BLOCK_BYTES = 128 << 10  # of the input: about 30,000 tokens, enough to sort by length, few enough to share out evenly


@dataclass(frozen=True)
class ValidationConfig:
    """What is searched for in what, prepared by the driver.

    `corpus` None stands for every `pos` and `neg` of `queries`. Lengths are in tokens, special ones included.
    """

    queries: Survey
    corpus: Survey | None
    query_max_len: int
    passage_max_len: int

    def groups(self, block: int) -> list[Group]:
        """The queries of a block."""
        return _values(self.queries, block, parse_pool if self.corpus is None else parse_judged)

    def passages(self, block: int) -> list[str]:
        """The passages of a block of the corpus, duplicates included."""
        if self.corpus is None:
            return [text for group in self.groups(block) for text in passages_of_group(group)]
        return _values(self.corpus, block, parse_passage)

    def lines(self) -> list[str]:
        """What a plan says about it, and the rows that are left out."""
        rows = "every `pos` and `neg` of them" if self.corpus is None else f"{self.corpus.total_rows:,} passages"
        found = [f"evaluation: {self.queries.total_rows:,} queries searched in {rows}"]
        for flag, each in (("--eval_data", self.queries), ("--eval_corpus", self.corpus)):
            if each is not None and each.bad_count:
                found.append(f"{flag}: {each.bad_count:,} rows are left out\n{named(each)}")
        return found


def prepare(arguments: TrainOptions, storage: Path) -> ValidationConfig | None:
    """Read --eval_data and --eval_corpus once and check every row; None without --eval_data.

    Files that cannot be read from the middle are written out plain under `storage`. Above 64 MiB the reading is spread
    over Ray if this process is connected. Raises UserError for flags, files and rows that cannot be used.
    """
    if not arguments.eval_data:
        if arguments.eval_corpus:
            raise UserError("--eval_corpus is what the queries of --eval_data are searched in: give --eval_data too")
        return None
    hidden = storage / ".raybge"

    def read(paths: list[str], flag: str, parse: Parse) -> Survey:
        files = transcode(list_files(paths, flag), str(hidden / "data"), ("gzip", "zstd", "array", "parquet"))
        return survey(files, BLOCK_BYTES, parse, arguments.on_bad_rows, str(hidden))

    return ValidationConfig(
        queries=read(arguments.eval_data, "--eval_data", parse_judged if arguments.eval_corpus else parse_pool),
        corpus=read(arguments.eval_corpus, "--eval_corpus", parse_passage) if arguments.eval_corpus else None,
        query_max_len=arguments.query_max_len,
        passage_max_len=arguments.passage_max_len,
    )


def parse_pool(raw: dict[str, Any]) -> Group:
    """As `parse_judged`, with the row's negatives: they belong to the corpus where no other is given."""
    judged = parse_judged(raw)
    return replace(judged, neg=parse_group({**raw, "pos": list(judged.pos)}).neg)


def _values(found: Survey, block: int, parse: Parse) -> list[Any]:
    """What the rows of a block parse to."""
    rows = read_block(found.files, found.blocks[block], parse)
    values = [row.value for row in rows if isinstance(row, Row)]
    if len(values) != found.rows[block]:
        raise UserError(f"{found.files[found.blocks[block].file].name} changed while it was in use")
    return values
