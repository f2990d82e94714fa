"""Files of vectors, in this process: content as read by numpy and pyarrow, and atomic appearance."""

import json
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raybge import quantize_embeddings
from raybge.encoding import vector_writer
from raybge.encoding.fields import column_type, field_columns, value_kind
from raybge.encoding.row_encoder import ROWS as ROW_SCHEMA
from raybge.encoding.vector_writer import FLAG, SUCCESS_FILE, Layout, is_finished, output_format, split_parts, write
from raybge.search.columns import vectors_column
from raybge.search.store import EncodedBlock, Store
from raybge.util import atomic_write
from raybge.util.errors import UserError

SIZES = (5, 1, 7, 4)
E_ND = np.random.default_rng(0).normal(size=(sum(SIZES), 12)).astype(np.float32)
ROWS = [{"id": i, "text": f"text {i} é"} for i in range(sum(SIZES))]
FIELDS = pa.schema([("id", pa.int64()), ("text", pa.string())])


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def blocks(store) -> list[EncodedBlock]:
    """Write blocks of several sizes; their names are not in order."""
    encoded, start = [], 0
    for number, size in enumerate(SIZES):
        rows = [json.dumps(row) for row in ROWS[start : start + size]]
        table = pa.table([pa.array(rows, pa.large_string())], schema=ROW_SCHEMA)
        name = f"{9 - number}{number}"
        store.write_table(name, table.append_column("vector", vectors_column(E_ND[start : start + size])))
        encoded.append(EncodedBlock(name, size))
        start += size
    return encoded


@pytest.fixture
def bar():
    bar = types.SimpleNamespace(n=0)
    bar.update = lambda n: setattr(bar, "n", bar.n + n)
    return bar


@pytest.fixture
def in_this_process(monkeypatch):
    """Run Ray tasks as plain calls."""
    import ray

    monkeypatch.setattr(ray, "remote", lambda function: types.SimpleNamespace(remote=function))
    monkeypatch.setattr(
        vector_writer, "results_in_order", lambda calls: (function(*arguments) for function, *arguments in calls)
    )


def layout(precision="float32") -> Layout:
    ranges_2D = np.stack([E_ND.min(0), E_ND.max(0)]) if precision in ("int8", "uint8") else None
    return Layout(FIELDS, 12, precision, ranges_2D)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_npy_holds_rows_in_order(store, blocks, bar, tmp_path, precision):
    path = tmp_path / "new" / "vectors.npy"
    write(str(path), blocks, layout(precision), store, bar)
    vectors = np.load(path, mmap_mode="r")
    expected = quantize_embeddings(E_ND, precision)  # all at once, with the ranges of all
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)
    assert bar.n == len(ROWS)
    assert [each.name for each in path.parent.iterdir()] == ["vectors.npy"]


@pytest.mark.parametrize("precision", ["float32", "uint8", "binary"])
def test_parquet_holds_fields_and_fixed_size_lists(store, blocks, bar, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(vector_writer, "ROW_GROUP_BYTES", 600 if precision == "float32" else 200)
    path = str(tmp_path / "vectors.parquet")
    write(path, blocks, layout(precision), store, bar)
    table = pq.read_table(path)
    expected = quantize_embeddings(E_ND, precision)
    kind = table.schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind) and kind.list_size == expected.shape[1]
    assert table.select(["id", "text"]).to_pylist() == ROWS
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), expected.dtype), expected)
    assert 1 < pq.read_metadata(path).num_row_groups < len(SIZES)  # blocks are combined


def test_folder_reads_as_one_table(store, blocks, bar, tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(vector_writer, "PART_ROWS", 12)
    folder = tmp_path / "vectors"
    write(str(folder), blocks, layout(), store, bar)
    assert sorted(path.name for path in folder.iterdir()) == [SUCCESS_FILE, "part-00000.parquet", "part-00001.parquet"]
    table = pq.read_table(folder)
    assert table["id"].to_pylist() == list(range(len(ROWS))) and bar.n == len(ROWS)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), E_ND)
    assert is_finished(str(folder))


def test_parts_are_consecutive_blocks(monkeypatch):
    monkeypatch.setattr(vector_writer, "PART_ROWS", 10)
    numbered = [EncodedBlock(str(i), rows) for i, rows in enumerate([4, 4, 4, 20, 1, 9, 2])]
    parts = [[block.name for block in part] for part in split_parts(numbered)]
    assert parts == [["0", "1", "2"], ["3"], ["4", "5"], ["6"]]
    assert split_parts([]) == []


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "v"])
def test_output_appears_only_when_complete(store, blocks, bar, tmp_path, name, in_this_process):
    folder = tmp_path / "out"
    lost = [*blocks[:2], EncodedBlock("none", 3)]
    with pytest.raises(FileNotFoundError):
        write(str(folder / name), lost, layout(), store, bar)
    assert list(folder.iterdir()) == [] and not is_finished(str(folder / name))
    write(str(folder / name), blocks, layout(), store, bar)
    with pytest.raises(FileNotFoundError):  # the existing output remains
        write(str(folder / name), lost, layout(), store, bar)
    assert [path.name for path in folder.iterdir()] == [name] and is_finished(str(folder / name))
    # and is replaced as a whole
    write(str(folder / name), blocks[:1], layout(), store, bar)
    vectors = np.load(folder / name) if name == "v.npy" else pq.read_table(folder / name)
    assert len(vectors) == SIZES[0]


def test_leftovers_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    left = tmp_path / f"v.part-{atomic_write.platform.node()}-4194305"  # above any process id
    left.mkdir()
    (left / "part-00000.parquet").write_bytes(b"half")
    with atomic_write.atomic_folder(str(tmp_path / "v"), FLAG, SUCCESS_FILE):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_folder_at_a_uri(store, blocks, bar, tmp_path, in_this_process):
    """A file:// URI is opened as a local folder."""
    path = f"file://{tmp_path}/v"
    write(path, blocks, layout(), store, bar)
    assert is_finished(path) and pq.read_table(tmp_path / "v").num_rows == len(ROWS)


def test_output_formats_and_conflicts(tmp_path):
    assert [output_format(path) for path in ("a/b.npy", "b.parquet", "s3://c/d.parquet?region=x", "v1.2", "v/")] == [
        "npy",
        "parquet",
        "parquet",
        "folder",
        "folder",
    ]
    with pytest.raises(UserError, match="--output_file out.jsonl: vectors are written as .parquet"):
        output_format("out.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, but the output is a folder"):
        is_finished(str(tmp_path / "file"))
    with pytest.raises(UserError, match="holds files that this command did not write"):
        is_finished(str(tmp_path))
    with pytest.raises(UserError, match="is a folder, expected the name of a file"):
        (tmp_path / "v.npy").mkdir()
        is_finished(str(tmp_path / "v.npy"))


@pytest.mark.parametrize("name", ["folder", "v.parquet"])
def test_an_output_that_cannot_be_reached_is_named(name, monkeypatch):
    def denied(self, path, **_):
        raise PermissionError("access denied")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", denied)
    with pytest.raises(UserError, match=f"--output_file: memory://{name} cannot be written .*access denied"):
        is_finished(f"memory://{name}")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, -3], pa.int64(), [1, None, -3]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([True, False], pa.bool_(), [True, False]),
        (["a", None], pa.string(), ["a", None]),
        (["a", 7, 1.5, True], pa.string(), ["a", "7", "1.5", "true"]),
        ([{"é": [1]}, [2]], pa.string(), ['{"é": [1]}', "[2]"]),
        ([2**63, 1], pa.string(), ["9223372036854775808", "1"]),
        ([True, 1], pa.string(), ["true", "1"]),
    ],
)
def test_column_type_follows_values(values, kind, expected):
    assert column_type(map(value_kind, values)) == kind
    (column,) = field_columns([{"x": value} for value in values], pa.schema([("x", kind)]))
    assert column.to_pylist() == expected and column.type == kind
    assert column_type([value_kind(None)]) is None
