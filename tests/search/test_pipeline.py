"""Duplicates and encoding, without Ray: the functions that its tasks and actors run."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.cluster import Plan
from raybge.data.files import list_files
from raybge.data.groups import parse_group, parse_passage, text_key
from raybge.data.jsonl import cut
from raybge.errors import UserError
from raybge.search import pipeline
from raybge.search.shards import keys_of, vectors_of, words_of


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_the_first_of_each_text_is_kept(keys):
    keep = pipeline.first_of_each(np.array(keys, np.uint64).reshape(-1, 2))
    assert keep.tolist() == [key not in keys[:i] for i, key in enumerate(keys)]


def test_keys_are_counted_by_block_in_the_order_of_the_file(tmp_path):
    texts = [f"passage {i % 7}" for i in range(40)]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = list_files(str(path), "--candidate_pool")
    blocks = [(files[0], block) for block in cut(files, 100)]
    counts, keys = pipeline._keys(blocks, parse_passage, pipeline.passage_itself)
    assert len(counts) == len(blocks) > 3 and counts.sum() == 40
    assert keys.tolist() == words_of([text_key(text) for text in texts]).tolist()
    assert pipeline.first_of_each(keys).nonzero()[0].tolist() == list(range(7))


def test_the_pool_of_groups_is_their_positives_and_negatives():
    group = parse_group({"query": "q", "pos": "p", "neg": ["n", "m"]})
    assert tuple(pipeline.passages_of_group(group)) == ("p", "n", "m")


def options(tiny_model, **more):
    return {"model_name_or_path": tiny_model, **more}


def block_of(texts, queries=None, prompts=None):
    return pipeline._table(0, list(range(len(texts))), texts, [[t] for t in texts], queries, prompts)


def test_passages_are_encoded_with_their_instruction(tiny_model):
    from raybge.model.encoder import Encoder

    more = {"passage_instruction_for_retrieval": "ak al", "passage_instruction_format": "{} {}"}
    encoded = pipeline._Embed(options(tiny_model, **more), Plan(1, 1, 0))(block_of(["bk bl", "ck", "dk dl"]))
    expected = Encoder(tiny_model, devices="cpu").encode_corpus(["ak al bk bl", "ak al ck", "ak al dk dl"])
    np.testing.assert_allclose(vectors_of(encoded), expected, atol=1e-6)
    bare = pipeline._Embed(options(tiny_model), Plan(1, 1, 0))(block_of(["bk bl", "ck", "dk dl"]))
    assert np.abs(vectors_of(bare) - expected).max() > 0.01
    assert encoded["text"].to_pylist() == ["bk bl", "ck", "dk dl"]


def test_queries_are_encoded_with_the_row_s_own_prompt_before_the_flag_s(tiny_model):
    from raybge.model.encoder import Encoder

    more = {"query_instruction_for_retrieval": "ak", "query_instruction_format": "{} {}", "query_max_length": 5}
    table = block_of(["{}", "{}", "{}"], ["bk", "bk", "ck cl cm cn co cp"], [None, "al", ""])
    encoded = pipeline._Embed(options(tiny_model, **more), Plan(1, 1, 0))(table)
    encoder = Encoder(tiny_model, devices="cpu", query_max_length=5)
    expected = encoder.encode_queries(["ak bk", "al bk", "ck cl cm"])  # 5 tokens are 3 words
    np.testing.assert_allclose(vectors_of(encoded), expected, atol=1e-6)
    assert encoded.schema.names == [*pipeline.ENCODED.names, "vector"]


def test_a_block_without_passages_gives_an_empty_one(tiny_model):
    encoded = pipeline._Embed(options(tiny_model), Plan(1, 1, 0))(block_of([]))
    assert vectors_of(encoded).shape == (0, 32) and keys_of(encoded)[0].shape == (0, 2)


def test_vectors_that_are_no_numbers_stop_the_run(tiny_model, monkeypatch):
    actor = pipeline._Embed(options(tiny_model), Plan(1, 1, 0))
    nothing = np.full((1, 32), np.nan, np.float32)
    monkeypatch.setattr(actor._encoder, "encode_corpus", lambda texts, convert_to_numpy: nothing)
    with pytest.raises(RuntimeError, match="inf or nan"):
        actor(block_of(["bk"]))


def test_a_file_that_changes_after_the_survey_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": "p"}\n' * 3)
    files = list_files(str(path), "--input_file")
    read = lambda rows: pipeline._read_queries(files[0], cut(files, 1 << 20)[0], parse_group, lambda g: g.pos, rows)  # noqa: E731
    assert isinstance(read(3)[0], pa.Table)
    with pytest.raises(UserError, match=r"rows.jsonl changed while it was in use"):
        read(4)
