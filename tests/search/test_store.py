"""Store: names, complete files, memory-mapped tables, digests."""

import numpy as np
import pyarrow as pa
import pytest

from raybge.cli.console import Console
from raybge.search.spec import OutputSpec
from raybge.search.store import Store, run_store, table_digest
from raybge.util.digest import digest, files_digest


def table(rows=3, word="text"):
    return pa.table({"text": pa.array([f"{word} {i}" for i in range(rows)]), "n": pa.array(range(rows), pa.int64())})


def test_round_trip(tmp_path):
    store = Store(str(tmp_path / "work"))
    assert not store.has("ab12") and not store.exists()
    store.write_table("ab12", table())
    store.write_arrays("cd34", x=np.arange(3), y=np.ones((2, 2)))
    assert store.has("ab12") and store.table("ab12").equals(table())
    assert store.arrays("cd34")["y"].tolist() == [[1, 1], [1, 1]]
    store.remove()
    assert not store.exists()


def test_table_is_one_memory_mapped_chunk(tmp_path):
    store = Store(str(tmp_path))
    before = pa.total_allocated_bytes()
    store.write_table("ab", pa.concat_tables([table(50_000), table(50_000)]))
    result = store.table("ab")
    assert result["n"].num_chunks == 1 and len(result) == 100_000
    assert pa.total_allocated_bytes() - before < 1000


@pytest.mark.parametrize(
    ("overwrite", "finished", "how"),
    [
        (False, False, "the same command continues with it"),
        (True, True, "the same command continues with it"),
        (True, False, "the same command without --overwrite continues with it"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_run_says_what_is_kept(tmp_path, capsys, overwrite, finished, how, error):
    output = OutputSpec(str(tmp_path / "out"), overwrite)
    with pytest.raises(error), run_store(output, "mine", finished, Console()) as store:
        store.keep_on_failure = True
        store.write_table("ab", table())
        raise error
    assert capsys.readouterr().err == f"the work so far is kept in {tmp_path}/out.work: {how}\n"
    with run_store(output, "mine", True, Console()) as store:
        assert store.has("ab")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err


def test_run_that_stores_nothing_is_silent(tmp_path, capsys):
    with pytest.raises(ValueError), run_store(OutputSpec(str(tmp_path / "out")), "mine", False, Console()):
        raise ValueError
    assert not capsys.readouterr().err


def test_failed_write_leaves_nothing(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="allow_pickle"):
        store.write_arrays("ab", x=np.array([object()], object))
    assert not store.has("ab") and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_store_at_a_uri_is_copied_then_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "near"))
    (tmp_path / "near").mkdir()
    far = Store((tmp_path / "far").as_uri())
    far.write_table("ab", table())
    monkeypatch.setattr(Store, "local", property(lambda self: False))
    assert far.table("ab").equals(table())
    assert len(list((tmp_path / "near").rglob("ab"))) == 1
    copy = far.table("ab")
    far.remove_local_copies()
    assert not list((tmp_path / "near").rglob("ab")) and copy.equals(table()) and far.table("ab").equals(table())


def test_digest_depends_on_content_only():
    whole = table(10)
    parts = pa.concat_tables([whole.slice(0, 4), whole.slice(4)])
    assert table_digest(whole, "a") == table_digest(parts, "a") == table_digest(table(10), "a")
    assert table_digest(whole.slice(2, 3), "a") == table_digest(pa.table(whole.slice(2, 3).to_pydict()), "a")
    others = [table_digest(whole, "b"), table_digest(table(11), "a"), table_digest(table(10, "word"), "a")]
    assert len({table_digest(whole, "a"), *others}) == 4
    assert digest("a", {"b": 1, "c": 2}) == digest("a", {"c": 2, "b": 1}) != digest("a", {"b": 1, "c": 3})


def test_files_digest_depends_on_names_and_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("y")
    before = files_digest([one, two])
    assert files_digest([two, one]) == before
    one.write_text("y")
    two.write_text("x")
    assert files_digest([one, two]) != before
