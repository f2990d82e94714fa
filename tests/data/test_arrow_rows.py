"""Parquet and Arrow files of other programs: all types of text and of lists, and values that nobody reads."""

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from samples import read_all

from raybge.data.arrow_rows import json_rows
from raybge.data.groups import Group, parse_group, parse_judged, parse_scored_group
from raybge.data.jsonl import BadRow, Row, cut, read_block
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.data.transcode import UNPACK, transcode
from raybge.util.errors import UserError

TEXTS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    pa.dictionary(pa.int16(), pa.binary()),
]  # fmt: skip
LISTS = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda item: pa.list_(item, 2)]


def rows_of(table: pa.Table) -> list[Any]:
    return [
        text if not isinstance(text, str) else json.loads(text)
        for batch in table.combine_chunks().to_batches()
        for text in json_rows(batch)
    ]


def parse_file(path: Path, parse: Any) -> list[Any]:
    files = list_files(path, "--f")
    return [row for block in cut(files, 1 << 20) for row in read_block(files, block, parse)]


def write_parquet(path: Path, table: pa.Table) -> bool:
    """Write the table; False for a type that Parquet lacks."""
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError:
        return False
    return True


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("make_list", LISTS, ids=lambda make: str(make(pa.int8())))
def test_text_and_lists_of_every_type(tmp_path, text, make_list):
    """Each row is a group; in Arrow files of both forms, and in Parquet where it has the type."""
    words = ["é!", "abc"]  # 3 bytes each, for the binary type of fixed size
    query = pa.array(words, pa.string()).cast(text) if not pa.types.is_fixed_size_binary(text) else None
    if query is None:
        query = pa.array([word.encode() for word in words], text)
    texts = pa.array([[word.encode() for word in words]] * 2, pa.list_(pa.binary()))
    items = pa.array(query.to_pylist() * 2, text) if not pa.types.is_dictionary(text) else pa.concat_arrays([query] * 2)
    pos = pa.ListArray.from_arrays(pa.array([0, 2, 4], pa.int32()), items)
    try:
        pos = pos.cast(make_list(text))
    except pa.ArrowNotImplementedError:
        pos = pa.array(texts.to_pylist(), make_list(pa.binary()))
    table = pa.table({"query": query, "pos": pos, "neg": pa.nulls(2)})
    expected = [Group(word, tuple(words), (), None) for word in words]
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    for name in ("stream.arrow", "file.arrow"):
        assert [row.value for row in parse_file(tmp_path / name, parse_group)] == expected
    if write_parquet(tmp_path / "t.parquet", table):
        assert [row.value for row in parse_file(tmp_path / "t.parquet", parse_group)] == expected


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pa.array([math.nan, math.inf]), None),
        (pa.array([[1.0, -math.inf], [math.nan]]), [1.0, None]),
        (pa.array([{"x": math.nan}, {"x": 1.0}]), {"x": None}),
        (pa.array([math.nan, 1.5], pa.float16()), None),
        (pa.array([b"\xff\xd8", b"\xff"]), {"base64": "/9g="}),
        (pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()), {"unreadable": "date value out of range"}),
        (pa.array([2**62, 0], pa.timestamp("us")), {"unreadable": ""}),
        (pa.array([b"b\xe9d", b"good"]).view(pa.string()), {"base64": "YulkZ29vZA=="}),
        (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())), [["k", 1]]),
        (pa.array([datetime.timedelta(seconds=1), None]), "0:00:01"),
        (pa.array([b"\0" * 16, None], pa.uuid()), "00000000-0000-0000-0000-000000000000"),
        (pa.array([decimal.Decimal("0.50"), None]), 0.5),
        (pa.array([2**63, 0], pa.uint64()), 2**63),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)  # fmt: skip
def test_column_that_nobody_reads_refuses_nothing(tmp_path, column, value):
    table = pa.table({"query": ["a", "b"], "pos": [["x"], ["y"]], "other": column})
    pq.write_table(table, tmp_path / "t.parquet", store_schema=True)
    first, second = parse_file(tmp_path / "t.parquet", parse_group)
    assert (first.value, second.value) == (Group("a", ("x",), (), None), Group("b", ("y",), (), None))
    if isinstance(value, dict) and "base64" in value:
        assert first.raw["other"].keys() == {"base64"}
    elif isinstance(value, dict) and "unreadable" in value:
        assert first.raw["other"].keys() == {"unreadable"}
    else:
        assert first.raw["other"] == value


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"query": pa.array([b"\xff\xd8"])}, "query"),
        ({"query": pa.array([b"b\xe9d"]).view(pa.string())}, "query"),
        ({"pos": pa.array([[b"\xff"]])}, "pos"),
        ({"query": pa.array([1.5])}, "query"),
        ({"query": pa.array([["a"]])}, "query"),
        ({"query": pa.array([{"text": "a"}])}, "query"),
        ({"pos": pa.array([[["x"]]])}, "pos"),
        ({"pos": pa.array([["x", None]])}, "pos"),
        ({"pos": pa.nulls(1)}, "pos"),
        ({"pos_scores": pa.array([[math.nan]])}, "pos_scores"),
        ({"pos_scores": pa.array([[math.inf]])}, "pos_scores"),
        ({"pos_scores": pa.array(["1"])}, "pos_scores"),
    ],
    ids=lambda each: str(next(iter(each.values())).type) if isinstance(each, dict) else each,
)
def test_column_that_is_read_is_named(tmp_path, columns, field):
    good = {"query": pa.array(["a"]), "pos": pa.array([["x"]]), "pos_scores": pa.array([[1.0]])}
    pq.write_table(pa.table(good | columns), tmp_path / "t.parquet")
    (row,) = parse_file(tmp_path / "t.parquet", parse_scored_group)
    assert isinstance(row, BadRow) and row.field == field


def test_decimals_are_numbers(tmp_path):
    """Spark and DuckDB write literals as decimals."""
    score, grade = pa.array([[decimal.Decimal("0.25")]]), pa.array([[decimal.Decimal("2")]])
    pq.write_table(
        pa.table({"query": ["q"], "pos": [["p"]], "pos_scores": score, "grades": grade}), tmp_path / "t.parquet"
    )
    (row,) = parse_file(tmp_path / "t.parquet", parse_scored_group)
    assert row.value.pos_scores == (0.25,)
    (row,) = parse_file(tmp_path / "t.parquet", parse_judged)
    assert row.value.grades == (2,)


def test_two_columns_of_one_name_are_refused():
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    (error,) = rows_of(table)
    assert error.field == "text" and error.expected == "must be the name of one column, found two"


def test_categories_of_pandas_are_text(tmp_path):
    import pandas

    frame = pandas.DataFrame({"query": ["a", "b", "a"], "pos": [["x"], ["y"], ["z"]]}, index=[5, 6, 7])
    frame["query"] = frame["query"].astype("category")
    frame.to_parquet(tmp_path / "t.parquet")
    assert [row.value.query for row in parse_file(tmp_path / "t.parquet", parse_group)] == ["a", "b", "a"]


# --- any nesting ------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.one_of(st.text(max_size=5), st.integers(-(2**40), 2**40), finite, st.booleans())


def columns_of(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.none() | values, min_size=2, max_size=2)


kinds = st.sampled_from([st.text(max_size=5), st.integers(-(2**40), 2**40), finite, st.booleans()])
nested = st.recursive(
    kinds,
    lambda inner: st.one_of(
        inner.map(lambda item: st.lists(st.none() | item, max_size=3)),
        inner.map(lambda item: st.fixed_dictionaries({"k": item, "m": st.none() | item})),
    ),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rows_equal_those_of_datasets(data):
    """Whatever the nesting; a NumPy-free library reads the same rows."""
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    columns = {name: data.draw(columns_of(data.draw(nested))) for name in names}
    table = pa.table(columns)
    expected = datasets.Dataset(table).to_list()
    assert rows_of(table) == expected


# --- folders of datasets ----------------------------------------------------------------------------------------------

GROUPS = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": []} for i in range(25)]


def queries(path: Path) -> list[str]:
    return [row.value.query for row in parse_file(path, parse_group)]


def test_folder_of_save_to_disk_is_read_in_its_order(tmp_path):
    data = datasets.Dataset.from_list(GROUPS)
    data.shuffle(seed=1).save_to_disk(tmp_path / "hf", num_shards=3)
    expected = data.shuffle(seed=1)["query"]
    assert queries(tmp_path / "hf") == list(expected)
    state = tmp_path / "hf" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"].reverse()
    state.write_text(json.dumps(content))
    (tmp_path / "hf" / "cache-1.arrow").write_bytes(b"of an earlier map")
    files = list_files(tmp_path / "hf", "--f")
    assert [Path(file.name).name for file in files] == [each["filename"] for each in content["_data_files"]]
    assert sorted(queries(tmp_path / "hf")) == sorted(expected) and queries(tmp_path / "hf") != list(expected)


def test_folder_of_save_to_disk_within_a_folder(tmp_path):
    datasets.Dataset.from_list(GROUPS[:2]).save_to_disk(tmp_path / "data" / "hf")
    (tmp_path / "data" / "more.jsonl").write_text(json.dumps(GROUPS[2]) + "\n")
    assert queries(tmp_path / "data") == ["q0", "q1", "q2"]


def test_folder_of_save_to_disk_is_written_out_for_training(tmp_path):
    datasets.Dataset.from_list(GROUPS).save_to_disk(tmp_path / "hf")
    files = transcode(list_files(tmp_path / "hf", "--f"), str(tmp_path / "cache"), tuple(UNPACK))
    assert [file.kind for file in files] == ["jsonl"] and survey(files, 100, parse_group).total_rows == 25


def test_a_split_of_a_dataset_dict_must_be_named(tmp_path):
    data = datasets.Dataset.from_list(GROUPS)
    splits = datasets.DatasetDict(train=data, test=data.select([3]))
    splits.save_to_disk(tmp_path / "hf")
    with pytest.raises(UserError, match=r"is a DatasetDict of datasets.save_to_disk: name one of its splits, hf/train"):
        list_files(tmp_path / "hf", "--f")
    assert queries(tmp_path / "hf" / "test") == ["q3"]
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    assert len(queries(tmp_path / "one")) == 25


def test_a_missing_or_damaged_file_of_a_data_set_is_named(tmp_path):
    datasets.Dataset.from_list(GROUPS).save_to_disk(tmp_path / "hf", num_shards=2)
    shard = tmp_path / "hf" / "data-00001-of-00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    rows = parse_file(tmp_path / "hf", parse_group)
    assert isinstance(rows[-1], BadRow) and "whole Arrow file" in rows[-1].expected
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is missing, which state.json of datasets"):
        list_files(tmp_path / "hf", "--f")
    (tmp_path / "hf" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json is not JSON"):
        list_files(tmp_path / "hf", "--f")


def test_bad_rows_of_an_arrow_file_do_not_end_it(tmp_path):
    table = pa.table({"query": ["a", "", "c"], "pos": [["x"]] * 3})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [type(row) for row in read_all(list_files(tmp_path, "--f"), 1 << 20)[0]] == [Row] * 3
    assert [type(row) for row in parse_file(tmp_path / "t.parquet", parse_group)] == [Row, BadRow, Row]


@pytest.mark.parametrize("state", ['{"_data_files": ["a.arrow"]}', '{"x": 1}', "[]"])
def test_state_files_of_other_programs_are_no_data_sets(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "more.jsonl").write_text(json.dumps(GROUPS[0]) + "\n")
    assert "more.jsonl" in [Path(file.name).name for file in list_files(tmp_path, "--f")]


def test_a_selection_of_an_old_version_is_refused(tmp_path):
    datasets.Dataset.from_list(GROUPS).save_to_disk(tmp_path / "hf")
    state = tmp_path / "hf" / "state.json"
    content = json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names a selection of rows"):
        list_files(tmp_path / "hf", "--f")
