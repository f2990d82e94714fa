"""Tokens that runs share: made once, whole, and never in the way of a run."""

import pyarrow as pa
import pytest

from raybge.data.token_cache import TokenCache

SCHEMA = pa.schema([("step", pa.int64()), ("tokens", pa.list_(pa.int32()))])
TABLES = [pa.table({"step": [i], "tokens": [[i] * i]}, SCHEMA) for i in range(5)]


def test_what_was_made_once_is_read(tmp_path):
    kept = TokenCache(str(tmp_path / "new" / "folder"))
    assert [*kept.tables("a", lambda: iter(TABLES))] == TABLES
    assert [*kept.tables("a", lambda: pytest.fail("made again"))] == TABLES
    assert [*kept.tables("b", lambda: iter(TABLES[:1]))] == TABLES[:1]


def test_what_was_not_taken_to_its_end_is_made_again(tmp_path):
    kept = TokenCache(str(tmp_path))
    next(kept.tables("a", lambda: iter(TABLES)))
    assert not list(tmp_path.iterdir())
    assert [*kept.tables("a", lambda: iter(TABLES))] == TABLES


def test_a_disk_that_cannot_be_written_costs_the_file_alone(tmp_path):
    (tmp_path / "full").touch()
    kept = TokenCache(str(tmp_path / "full" / "folder"))
    for _ in range(2):
        assert [*kept.tables("a", lambda: iter(TABLES))] == TABLES


def test_nothing_to_keep_is_no_file(tmp_path):
    assert not [*TokenCache(str(tmp_path)).tables("a", lambda: iter(()))] and not list(tmp_path.iterdir())
