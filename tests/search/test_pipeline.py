"""Encoding, without Ray: the functions that its tasks and actors run."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from raybge.cluster.resources import Plan
from raybge.data.groups import Group, parse_group, text_key
from raybge.data.jsonl import cut
from raybge.data.source_files import list_files
from raybge.search import pipeline
from raybge.search.session import embedder_of
from raybge.search.shards import keys_of, vectors_of, words_of
from raybge.search.store import Store, table_digest
from raybge.util.errors import UserError


def test_the_pool_of_groups_is_their_positives_and_negatives():
    group = parse_group({"query": "q", "pos": "p", "neg": ["n", "m"]})
    assert tuple(pipeline.passages_of_group(group)) == ("p", "n", "m")


@pytest.fixture
def actor(tiny_model, tmp_path):
    def make(**more):
        options = {"model_name_or_path": tiny_model, "cache_dir": None, **more}
        return pipeline._Embed(embedder_of(options, Plan(1, 1, 0)), Store(str(tmp_path)), Plan(1, 1, 0))

    return make


def passages_of(texts):
    keys = [words_of([text_key(text)]) for text in texts]
    return pipeline._table(3, 0, list(enumerate(texts)), keys)


def queries_of(queries, prompts, positives=None):
    groups = [Group(query, ("p",), (), prompt) for query, prompt in zip(queries, prompts, strict=True)]
    keys = [words_of([text_key("p")])] * len(groups)
    return pipeline._table(4, 0, [(i, "{}") for i in range(len(groups))], keys, groups, positives)


def encoded(actor, table):
    """Through the store, as a block goes."""
    said = actor(table)
    texts = table_digest(table.select(["text", "id"]))
    assert said.drop_columns(["name"]).to_pylist() == [
        {"block": table["block"][0].as_py(), "rows": len(table), "texts": texts}
    ]
    return actor._store.table(said["name"][0].as_py())


def test_passages_are_encoded_with_their_instruction(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"passage_instruction_for_retrieval": "ak al", "passage_instruction_format": "{} {}"}
    found = encoded(actor(**more), passages_of(["bk bl", "ck", "dk dl"]))
    expected = Encoder(tiny_model, devices="cpu").encode_corpus(["ak al bk bl", "ak al ck", "ak al dk dl"])
    np.testing.assert_allclose(vectors_of(found), expected, atol=1e-6)
    bare = encoded(actor(), passages_of(["bk bl", "ck", "dk dl"]))  # another name in the same store
    assert np.abs(vectors_of(bare) - expected).max() > 0.01
    assert found["text"].to_pylist() == ["bk bl", "ck", "dk dl"]


def test_queries_are_encoded_with_the_row_s_own_prompt_before_the_flag_s(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"query_instruction_for_retrieval": "ak", "query_instruction_format": "{} {}", "query_max_length": 5}
    table = queries_of(["bk", "bk", "ck cl cm cn co cp"], [None, "al", ""])
    found = encoded(actor(**more), table)
    encoder = Encoder(tiny_model, devices="cpu", query_max_length=5)
    expected = encoder.encode_queries(["ak bk", "al bk", "ck cl cm"])  # 5 tokens are 3 words
    np.testing.assert_allclose(vectors_of(found), expected, atol=1e-6)
    assert found.schema.names == [*pipeline.ENCODED.names, "vector"]


def test_positives_are_scored_with_the_query_where_that_is_asked_for(actor, tiny_model):
    from raybge.model.encoder import Encoder

    more = {"passage_instruction_for_retrieval": "ak", "passage_instruction_format": "{} {}"}
    table = queries_of(["bk", "cl cm"], [None, None], [["dk", "el em"], ["fk"]])
    found = encoded(actor(**more), table)["pos_scores"].to_pylist()
    encoder = Encoder(tiny_model, devices="cpu")
    q_QD, p_PD = encoder.encode_queries(["bk", "cl cm"]), encoder.encode_corpus(["ak dk", "ak el em", "ak fk"])
    np.testing.assert_allclose(found[0], [q_QD[0] @ p_PD[0], q_QD[0] @ p_PD[1]], atol=1e-6)
    np.testing.assert_allclose(found[1], [q_QD[1] @ p_PD[2]], atol=1e-6)


def test_a_block_that_is_kept_is_not_encoded_again(actor, monkeypatch):
    first, table = actor(), passages_of(["bk", "cl"])
    said = first(table)
    second = actor()
    monkeypatch.setattr(second, "encoded", None)  # calling it would fail
    assert second(table).equals(said) and second._encoder is None
    changed = passages_of(["bk", "cm"])
    with pytest.raises(TypeError):
        second(changed)
    assert actor(passage_max_length=3)(table)["name"] != said["name"]


def test_the_same_block_elsewhere_among_all_has_the_same_name(actor):
    table = passages_of(["bk", "cl"])
    other = table.set_column(table.schema.get_field_index("block"), "block", pa.array([9, 9], pa.int64()))
    embed = actor()
    assert embed(table)["name"] == embed(other)["name"] and embed(other)["block"].to_pylist() == [9]


def test_a_block_without_passages_says_nothing(actor):
    assert len(actor()(passages_of([]))) == 0


def test_vectors_that_are_no_numbers_stop_the_run(actor, monkeypatch):
    embed = actor()
    embed._load()
    nothing = np.full((1, 32), np.nan, np.float32)
    monkeypatch.setattr(embed._encoder, "encode_corpus", lambda texts, convert_to_numpy: nothing)
    with pytest.raises(RuntimeError, match="inf or nan"):
        embed(passages_of(["bk"]))


def test_a_file_that_changes_after_the_survey_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": "p"}\n' * 3)
    files = list_files(str(path), "--input_file")
    known = partial(pipeline._known, lambda group: group.pos, text_key)
    block = cut(files, 1 << 20)[0]
    read = lambda rows: pipeline._read_queries(0, files[0], block, parse_group, known, None, False, rows)  # noqa: E731
    (table,) = read(3)
    assert table.schema == pipeline.READ and keys_of(table)[1].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"rows.jsonl changed while it was in use"):
        read(4)
