"""Encoding files end to end on one Ray: vectors of an Encoder, in order, the same bytes for any number of actors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stub

from raybge import encode_dataset, quantize_embeddings
from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.encode import main
from raybge.encoding import vector_writer
from raybge.encoding.ray_dataset import ColumnEncoder
from raybge.encoding.run import encode
from raybge.encoding.spec import EncodingSpec
from raybge.search import inputs
from raybge.training.similarity_spec import SimilaritySpec
from raybge.util.errors import UserError

ROWS = 130


@pytest.fixture(scope="module")
def small_blocks(ray_cluster):
    """Cut inputs into small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", 1500)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """Write rows of uneven length to two files of several blocks; a repeated text, a row without an id."""
    rng = np.random.default_rng(3)
    rows = [{"id": f"p{i}", "text": " ".join(rng.choice(words, rng.integers(1, 15))), "n": i} for i in range(ROWS)]
    rows[9]["text"] = rows[2]["text"]
    rows[20] = {"text": "日本 \u2028 ak", "n": 2.5}
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("a.jsonl", rows[:70]), ("b.jsonl", rows[70:])):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), "utf-8")
    return folder, rows


@pytest.fixture(scope="module")
def encoded(small_blocks, data, tiny_model, tmp_path_factory):
    """Write outputs; return their folder and the result of each."""
    folder = tmp_path_factory.mktemp("out")
    shared = {"model_name_or_path": tiny_model, "input_file": str(data[0]), "passage_instruction_for_retrieval": "al "}
    outputs = {
        "one.parquet": {"num_workers": 1},
        "three.parquet": {"num_workers": 3},
        "query.npy": {"query_instruction_for_retrieval": "bk ", "kind": "query", "max_length": 8, "truncate_dim": 20},
    }
    results = {name: encode_dataset(**shared, **more, output_file=str(folder / name)) for name, more in outputs.items()}
    assert {path.name for path in folder.iterdir()} == {
        f"{name}{end}" for name in outputs for end in ("", ".meta.json")
    }
    return folder, results


@pytest.fixture(scope="module")
def encoder(tiny_model):
    from raybge import Encoder

    return Encoder(
        tiny_model, devices="cpu", query_instruction_for_retrieval="bk ", passage_instruction_for_retrieval="al "
    )


def assert_close(vectors, expected):
    assert vectors.dtype == expected.dtype and np.std(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(vectors, expected, atol=1e-5)  # fp32, unit vectors: chunks hold other texts


def test_bytes_do_not_depend_on_actors(encoded):
    folder, results = encoded
    assert (folder / "one.parquet").read_bytes() == (folder / "three.parquet").read_bytes()
    assert results["one.parquet"].counts["rows"] == ROWS and results["one.parquet"].dim == 32


def test_rows_and_vectors_keep_input_order(encoded, data, encoder):
    folder, (_, rows) = encoded[0], data
    texts = [row["text"] for row in rows]
    table = pq.read_table(folder / "one.parquet")
    assert table.column_names == ["id", "text", "embedding"]
    assert table["text"].to_pylist() == texts and table["id"].to_pylist() == [row.get("id") for row in rows]
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    assert_close(vectors, encoder.encode_corpus(texts))
    expected = encoder.encode_queries(texts, max_length=8, truncate_dim=20)
    assert_close(np.load(folder / "query.npy", mmap_mode="r"), expected)
    # maximum length and instructions do change the vectors
    assert not np.allclose(expected, encoder.encode_queries(texts, truncate_dim=20), atol=1e-2)
    assert not np.allclose(encoder.encode(texts), encoder.encode_corpus(texts), atol=1e-2)


def fixed(texts) -> np.ndarray:
    """Return the stub's vectors."""
    return stub.StubEncoder(None, 0, stub.DIM, "cpu").encode_corpus(texts)


def run(data, output, log, embedder=None, **more):
    flags = {"model_name_or_path": "none", "input_file": str(data[0]), "output_file": str(output), **more}
    return encode(build_options(EncodeOptions, flags), Console(), embedder or stub.embedder(log))


def blocks(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_folder_of_parts(small_blocks, data, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_writer, "PART_ROWS", 40)
    _, rows = data
    run(data, tmp_path / "v", None, keep_fields=["n", "text"])
    assert len(list((tmp_path / "v").glob("part-*.parquet"))) == 3
    table = pq.read_table(tmp_path / "v")
    assert table["n"].to_pylist() == [float(row["n"]) for row in rows]
    expected = fixed([row["text"] for row in rows])
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)


def test_int8_uses_the_ranges_of_all_vectors(small_blocks, data, tmp_path):
    """Equal to `quantize_embeddings` of the whole matrix, also in an output with explicit ranges."""
    vectors_ND = fixed([row["text"] for row in data[1]])
    expected = quantize_embeddings(vectors_ND, "int8")
    run(data, tmp_path / "all.npy", None, precision="int8")
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), expected)
    meta = tmp_path / "all.npy.meta.json"
    ranges_2D = np.array(json.loads(meta.read_text())["ranges"], np.float32)
    np.testing.assert_array_equal(ranges_2D, [vectors_ND.min(0), vectors_ND.max(0)])

    np.save(tmp_path / "ranges.npy", ranges_2D)
    later, more = tmp_path / "later.npy", {"precision": "int8", "overwrite": True}
    for ranges in (meta, tmp_path / "ranges.npy"):
        run((data[0] / "b.jsonl",), later, None, **more, ranges=str(ranges))
        np.testing.assert_array_equal(np.load(later), expected[70:])


def test_failed_run_continues_and_finished_run_is_skipped(small_blocks, data, tmp_path, monkeypatch, capfd):
    log, output = tmp_path / "log", tmp_path / "v.npy"
    with monkeypatch.context() as patch:
        patch.setattr(vector_writer, "write", lambda *arguments: pytest.fail("no space left"))
        with pytest.raises(BaseException, match="no space left"):
            run(data, output, log)
    assert not output.exists() and (tmp_path / "v.npy.work").is_dir()
    before = blocks(log)
    assert len(before) > 5 and len({*before}) == len(before)

    run(data, output, log)
    assert blocks(log) == before, "a block was encoded again"
    assert {path.name for path in tmp_path.iterdir()} == {"log", "v.npy", "v.npy.meta.json"}
    written = output.read_bytes()

    stamp = output.stat().st_mtime_ns
    assert not run(data, output, log).counts and "nothing to do (--overwrite" in capfd.readouterr().out
    assert output.stat().st_mtime_ns == stamp and blocks(log) == before

    run(data, output, log, overwrite=True, storage_path=str(tmp_path / "kept"))
    assert output.read_bytes() == written and output.stat().st_mtime_ns != stamp
    assert sorted(blocks(log)) == sorted(before * 2)
    # blocks under a storage_path are reused for another precision
    run(data, tmp_path / "bits.npy", log, precision="binary", storage_path=str(tmp_path / "kept"))
    assert sorted(blocks(log)) == sorted(before * 2) and np.load(tmp_path / "bits.npy").shape == (ROWS, 4)


def test_skipped_rows_leave_no_gap(small_blocks, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ak"}\n{"text": ""}\n\n{"text": "bl"}\n')
    assert run((path,), tmp_path / "v.npy", None, on_bad_rows="skip").counts["bad_rows"] == 1
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), fixed(["ak", "bl"]))


def test_ray_dataset_gets_a_column(small_blocks, data, tiny_model, encoder):
    import ray

    _, rows = data
    dataset = ray.data.from_items([{"body": row["text"], "n": i} for i, row in enumerate(rows)], override_num_blocks=3)
    more = {"text_field": "body", "kind": "query", "query_instruction_for_retrieval": "bk "}
    out_rows = encode_dataset(dataset, model_name_or_path=tiny_model, **more, num_workers=2).take_all()
    expected = encoder.encode_queries([row["text"] for row in rows])
    for row in out_rows:
        assert_close(np.asarray(row["embedding"], np.float32), expected[row["n"]])
    assert sorted(row["n"] for row in out_rows) == list(range(ROWS))


def test_ray_dataset_column_and_flags(tiny_model):
    ranges_2D = np.stack([-np.ones(stub.DIM), np.ones(stub.DIM)]).astype(np.float32)
    column = ColumnEncoder(stub.embedder(), "query", "body", "uint8", ranges_2D)
    table = column(pa.table({"body": ["ak", "bl"], "n": [1, 2]}))
    assert table.column_names == ["body", "n", "embedding"]
    expected = quantize_embeddings(fixed(["ak", "bl"]), "uint8", ranges_2D)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.uint8), expected)
    with pytest.raises(UserError, match="text_field: the Dataset has no column 'body', only text, n"):
        column(pa.table({"text": ["ak"], "n": [1]}))
    with pytest.raises(UserError, match='text_field: "body" must be a non-empty string, found null'):
        column(pa.table({"body": ["ak", None]}))
    dataset: Any = object()
    with pytest.raises(UserError, match="input_file does not apply to a Dataset"):
        encode_dataset(dataset, model_name_or_path=tiny_model, input_file="x")
    with pytest.raises(UserError, match="precision int8: .* set `ranges`"):
        encode_dataset(dataset, model_name_or_path=tiny_model, precision="int8")


# --- before Ray starts ------------------------------------------------------------------------------------


def argv(model, data, output="never.npy", **changed):
    values = {"model_name_or_path": model, "input_file": str(data[0]), "output_file": str(output), **changed}
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
        ({"input_file": "nowhere.jsonl"}, "--input_file: nowhere.jsonl: no such file or folder"),
        ({"output_file": "v.jsonl"}, "--output_file v.jsonl: vectors are written as .parquet"),
        ({"truncate_dim": 33}, "--truncate_dim 33: this model's vectors have 32 numbers"),
        ({"truncate_dim": 0}, "--truncate_dim must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"max_length": 0}, "--max_length must be at least 1"),
        ({"precision": "int4"}, "argument --precision: invalid choice"),
        ({"ranges": "r.npy"}, "--ranges requires --precision int8 or uint8"),
        ({"ranges": "r.npy", "precision": "int8"}, "--ranges r.npy holds no ranges (FileNotFoundError"),
        ({"keep_fields": "id embedding"}, "--keep_fields embedding: the vectors are written under this name"),
        ({"keep_fields": "id"}, 'a.jsonl:21: "id" is required, but the row has no such field'),
        ({"text_field": "n"}, 'a.jsonl:1: "n" must be a non-empty string, found 0'),
        ({"query_instruction_format": "{}"}, "{}"),
    ],
)
def test_invalid_flags_and_rows_are_named(data, tiny_model, capfd, monkeypatch, changed, message):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *arguments: pytest.fail("Ray was started"))
    assert main(argv(tiny_model, data, **changed)) == 2
    assert message in capfd.readouterr().err


def test_ranges_of_wrong_width_are_named(data, tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *arguments: pytest.fail("Ray was started"))
    np.save(tmp_path / "r.npy", np.zeros((2, 20), np.float32))
    ranges = str(tmp_path / "r.npy")
    assert main(argv(tiny_model, data, precision="int8", ranges=ranges)) == 2
    assert "expected floats of the shape (2, 32), found float32 (2, 20)" in capfd.readouterr().err


def test_output_must_not_be_an_input(tiny_model, tmp_path, capfd):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"x")
    assert main(argv(tiny_model, (path,), path)) == 2
    assert "is a file that --input_file reads" in capfd.readouterr().err


def test_dry_run_stops_after_the_plan(small_blocks, data, tiny_model, tmp_path, capfd):
    output = tmp_path / "v.npy"
    assert main(argv(tiny_model, data, output, dry_run=True)) == 0
    message = capfd.readouterr().out
    assert "passages up to 16 tokens" in message and f"data: {ROWS} rows" in message
    assert list(tmp_path.iterdir()) == []


def test_one_vector_has_no_ranges(small_blocks, tiny_model, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ak"}\n')
    assert main(argv(tiny_model, (path,), tmp_path / "v.npy", precision="uint8")) == 2
    assert "one vector has no ranges of its own; set --ranges" in capfd.readouterr().err


def test_each_flag_reaches_the_encoder(data, tiny_model):
    flags = {"model_name_or_path": tiny_model, "input_file": str(data[0]), "output_file": "o"}
    plain = EncodingSpec.from_options(build_options(EncodeOptions, flags)).model.keywords()
    changed = {
        "normalize_embeddings": False,
        "use_fp16": False,
        "query_instruction_for_retrieval": "a",
        "query_instruction_format": "{}:{}",
        "passage_instruction_for_retrieval": "a",
        "passage_instruction_format": "{}:{}",
        "pooling_method": "mean",
        "trust_remote_code": True,
        "cache_dir": "c",
        "batch_size": 7,
        "truncate_dim": 7,
    }
    for name, value in changed.items():
        keywords = EncodingSpec.from_options(build_options(EncodeOptions, {**flags, name: value})).model.keywords()
        assert {key for key in plain if plain[key] != keywords[key]} == {name} and keywords[name] == value


def test_training_accepts_the_vectors_of_queries(small_blocks, tiny_model, words, tmp_path):
    """Batches of similar queries (`--batch_vectors`) read the metadata."""
    rows = [{"query": word, "pos": [word]} for word in words[:9]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "queries.npy")
    data = {"model_name_or_path": tiny_model, "input_file": str(tmp_path / "rows.jsonl"), "output_file": path}
    encode_dataset(**data, kind="query", text_field="query", num_workers=2)
    flags = {"model_name_or_path": tiny_model, "train_data": ["d"], "output_dir": "o", "batch_by": "similarity"}
    spec = SimilaritySpec.from_options(build_options(TrainOptions, {**flags, "batch_vectors": path}))
    assert (spec.vectors.rows, spec.vectors.dim, spec.vectors.path) == (9, 32, path)
