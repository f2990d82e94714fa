"""Encoding without Ray: functions that its tasks and actors run."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from raybge.cluster.resources import Plan
from raybge.data.groups import Group, parse_group, text_key
from raybge.data.jsonl import cut
from raybge.data.source_files import list_files
from raybge.model.spec import EncoderSpec
from raybge.search import block_reader, pipeline
from raybge.search.columns import keys_of, vectors_of
from raybge.search.embedder import make_embedder
from raybge.search.key_table import key_words
from raybge.search.search_data import passages_of_group
from raybge.search.store import Store, table_digest
from raybge.util.errors import UserError


def test_passages_of_group_are_positives_and_negatives():
    group = parse_group({"query": "q", "pos": "p", "neg": ["n", "m"]})
    assert tuple(passages_of_group(group)) == ("p", "n", "m")


@pytest.fixture
def actor(tiny_model, tmp_path):
    def make(**more):
        embedder = make_embedder(EncoderSpec(tiny_model, **more), Plan(1, 1, 0))
        return pipeline.EncodingActor(embedder, Store(str(tmp_path)), "cpu")

    return make


def passages_of(texts):
    keys = [key_words([text_key(text)]) for text in texts]
    return block_reader.read_table(3, 0, list(enumerate(texts)), keys)


def queries_of(queries, prompts, positives=None):
    groups = [Group(query, ("p",), (), prompt) for query, prompt in zip(queries, prompts, strict=True)]
    keys = [key_words([text_key("p")])] * len(groups)
    return block_reader.read_table(4, 0, [(i, "{}") for i in range(len(groups))], keys, groups, positives)


def encoded(actor, table):
    """Encode a block through the store, as in a run."""
    result = actor(table)
    texts = table_digest(table.select(["text", "id"]))
    assert result.drop_columns(["name", "seconds", "note"]).to_pylist() == [
        {"block": table["block"][0].as_py(), "rows": len(table), "texts": texts}
    ]
    return actor._store.table(result["name"][0].as_py())


def test_seconds_of_a_block_exclude_the_loading_of_the_model(actor, monkeypatch):
    times = iter([0, 100, 103])  # loading ends at 100
    one = actor()
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: next(times)))
    first = one(passages_of(["bk bl"]))
    times = iter([200, 200, 205])
    second = one(passages_of(["ck"]))
    assert first["seconds"].to_pylist() == [3] and second["seconds"].to_pylist() == [5]


def test_passages_are_encoded_with_their_instruction(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"passage_instruction_for_retrieval": "ak al", "passage_instruction_format": "{} {}"}
    block = encoded(actor(**more), passages_of(["bk bl", "ck", "dk dl"]))
    expected = Encoder(tiny_model, devices="cpu").encode_corpus(["ak al bk bl", "ak al ck", "ak al dk dl"])
    np.testing.assert_allclose(vectors_of(block), expected, atol=1e-6)
    bare = encoded(actor(), passages_of(["bk bl", "ck", "dk dl"]))  # another name in the same store
    assert np.abs(vectors_of(bare) - expected).max() > 0.01
    assert block["text"].to_pylist() == ["bk bl", "ck", "dk dl"]


def test_prompt_of_a_row_overrides_the_flag(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"query_instruction_for_retrieval": "ak", "query_instruction_format": "{} {}", "query_max_length": 5}
    table = queries_of(["bk", "bk", "ck cl cm cn co cp"], [None, "al", ""])
    block = encoded(actor(**more), table)
    encoder = Encoder(tiny_model, devices="cpu", query_max_length=5)
    expected = encoder.encode_queries(["ak bk", "al bk", "ck cl cm"])  # 5 tokens are 3 words
    np.testing.assert_allclose(vectors_of(block), expected, atol=1e-6)
    assert block.schema.names == [*block_reader.ENCODED.names, "vector"]


def test_positives_are_scored_with_their_query(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"passage_instruction_for_retrieval": "ak", "passage_instruction_format": "{} {}"}
    table = queries_of(["bk", "cl cm"], [None, None], [["dk", "el em"], ["fk"]])
    scores = encoded(actor(**more), table)["pos_scores"].to_pylist()
    encoder = Encoder(tiny_model, devices="cpu")
    q_QD, p_PD = encoder.encode_queries(["bk", "cl cm"]), encoder.encode_corpus(["ak dk", "ak el em", "ak fk"])
    np.testing.assert_allclose(scores[0], [q_QD[0] @ p_PD[0], q_QD[0] @ p_PD[1]], atol=1e-6)
    np.testing.assert_allclose(scores[1], [q_QD[1] @ p_PD[2]], atol=1e-6)


def test_stored_block_is_not_encoded_again(actor, monkeypatch):
    first, table = actor(), passages_of(["bk", "cl"])
    result = first(table)
    second = actor()
    monkeypatch.setattr(second, "encoded", None)  # calling it would fail
    again = second(table)
    assert again.drop_columns(["seconds"]).equals(result.drop_columns(["seconds"])) and second._encode._encoder is None
    assert again["seconds"][0].as_py() < result["seconds"][0].as_py()
    changed = passages_of(["bk", "cm"])
    with pytest.raises(TypeError):
        second(changed)
    assert actor(passage_max_length=3)(table)["name"] != result["name"]


def test_block_name_does_not_depend_on_its_number(actor):
    table = passages_of(["bk", "cl"])
    other = table.set_column(table.schema.get_field_index("block"), "block", pa.array([9, 9], pa.int64()))
    embed = actor()
    assert embed(table)["name"] == embed(other)["name"] and embed(other)["block"].to_pylist() == [9]


def test_empty_block_has_no_result(actor):
    assert len(actor()(passages_of([]))) == 0


def test_nan_vectors_stop_the_run(actor, monkeypatch):
    embed = actor()
    embed._load()
    nan_vectors = np.full((1, 32), np.nan, np.float32)
    monkeypatch.setattr(embed._encode._encoder, "encode_corpus", lambda texts, convert_to_numpy: nan_vectors)
    with pytest.raises(RuntimeError, match="inf or nan"):
        embed(passages_of(["bk"]))


def test_file_changed_after_the_survey_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": "p"}\n' * 3)
    files = list_files(str(path), "--input_file")
    block = cut(files, 1 << 20)[0]

    def read(rows):
        return block_reader.QueryReader(0, files[0], block, rows, parse_group, lambda group: group.pos, text_key)()

    (table,) = read(3)
    assert table.schema == block_reader.READ and keys_of(table)[1].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"rows.jsonl changed during the run"):
        read(4)
