"""Shared token tables: created once, complete, and without effect on a run if they cannot be written."""

import pyarrow as pa
import pytest

from raybge.data.token_cache import TokenCache

SCHEMA = pa.schema([("step", pa.int64()), ("tokens", pa.list_(pa.int32()))])
TABLES = [pa.table({"step": [i], "tokens": [[i] * i]}, SCHEMA) for i in range(5)]


def test_tables_are_created_once_and_then_read(tmp_path):
    cache = TokenCache(str(tmp_path / "new" / "folder"))
    assert [*cache.tables("a", lambda: iter(TABLES))] == TABLES
    assert [*cache.tables("a", lambda: pytest.fail("made again"))] == TABLES
    assert [*cache.tables("b", lambda: iter(TABLES[:1]))] == TABLES[:1]


def test_tables_that_were_not_consumed_are_created_again(tmp_path):
    cache = TokenCache(str(tmp_path))
    next(cache.tables("a", lambda: iter(TABLES)))
    assert not list(tmp_path.iterdir())
    assert [*cache.tables("a", lambda: iter(TABLES))] == TABLES


def test_a_disk_that_cannot_be_written_costs_only_the_file(tmp_path):
    (tmp_path / "full").touch()
    cache = TokenCache(str(tmp_path / "full" / "folder"))
    for _ in range(2):
        assert [*cache.tables("a", lambda: iter(TABLES))] == TABLES


def test_no_tables_no_file(tmp_path):
    assert not [*TokenCache(str(tmp_path)).tables("a", lambda: iter(()))] and not list(tmp_path.iterdir())
