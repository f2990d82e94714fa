"""Duplicates and positives of the same query elsewhere: the parts of the exchange, run in a loop instead of on Ray."""

import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.cluster.shuffle import GROUPS, in_groups
from raybge.data.groups import near_key, parse_group, parse_passage, text_key
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.search import deduplication as duplicates
from raybge.search.pipeline import passage_itself
from raybge.search.shards import words_of
from raybge.search.store import Store


@pytest.fixture
def exchanged(monkeypatch):
    """The exchange without Ray, in three parts; blocks in groups of two."""

    def exchange(groups, parts, split, meet, join):
        splits = [split(group, 3) for group in groups]
        met = [meet([values[part] for _, values in splits]) for part in range(3)]
        pairs = zip(groups, splits, strict=True)
        return [join(group, kept, [part[n] for part in met]) for n, (group, (kept, _)) in enumerate(pairs)]

    monkeypatch.setattr(duplicates, "exchange", exchange)
    monkeypatch.setattr(duplicates, "LEAST_BLOCKS", 2)


def surveyed(folder, rows, parse, block_bytes=150):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return survey(list_files(str(path), "--input_file"), block_bytes, parse)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_the_first_of_each_text_is_kept(keys):
    keep = duplicates.first_of_each(np.array(keys, np.uint64).reshape(-1, 2))
    assert keep.tolist() == [key not in keys[:i] for i, key in enumerate(keys)]


def test_the_first_of_each_text_is_kept_in_any_parts(tmp_path, exchanged):
    texts = [f"passage {i * i % 17}" for i in range(60)]
    found = surveyed(tmp_path, [{"text": text} for text in texts], parse_passage)
    store = Store(str(tmp_path / "work"))
    kept = duplicates.deduplicate(found, parse_passage, passage_itself, store)
    assert len(kept.groups) > 3 and kept.found_B.sum() == 60 and kept.found_B.tolist() == found.rows.tolist()
    flags = [flag for block in range(len(found.blocks)) for flag in kept.reader(block)().tolist()]
    assert flags == [text not in texts[:i] for i, text in enumerate(texts)]
    assert (kept.passages, kept.dropped) == (len(set(texts)), 60 - len(set(texts)))


def test_what_was_found_is_read_on_a_second_start(tmp_path, exchanged, monkeypatch):
    found = surveyed(tmp_path, [{"text": f"passage {i % 7}"} for i in range(40)], parse_passage)
    store = Store(str(tmp_path / "work"))
    first = duplicates.deduplicate(found, parse_passage, passage_itself, store)
    monkeypatch.setattr(duplicates, "exchange", None)
    second = duplicates.deduplicate(found, parse_passage, passage_itself, store)
    assert second.kept_B.tolist() == first.kept_B.tolist() and second.found_B.tolist() == first.found_B.tolist()


def test_a_query_that_comes_again_knows_the_positives_of_all_its_rows(tmp_path, exchanged):
    rows = [{"query": f"query {i % 20}", "pos": [f"positive {i}", f"positive {i % 3}"]} for i in range(50)]
    rows += [{"query": "alone", "pos": ["p"]}, {"query": "QUERY  3", "pos": ["other case"]}]
    found = surveyed(tmp_path, rows, parse_group)
    elsewhere = duplicates.positives_elsewhere(found, parse_group, near_key, Store(str(tmp_path / "work")))
    assert len(elsewhere.groups) > 3
    keys = [row for block in range(len(found.blocks)) for row in elsewhere.reader(block)()]
    for row, known in zip(rows, keys, strict=True):
        same = [other for other in rows if other["query"].lower().split() == row["query"].lower().split()]
        expected = {near_key(text) for other in same for text in other["pos"]} if len(same) > 1 else set()
        assert sorted(map(tuple, known.tolist())) == sorted(map(tuple, words_of(list(expected)).tolist()))


def test_a_query_repeated_without_end_stays_small(tmp_path, exchanged, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_KNOWN", 5)
    rows = [{"query": "q", "pos": [f"positive {i}"]} for i in range(30)] + 3 * [{"query": "r", "pos": ["p"]}]
    found = surveyed(tmp_path, rows, parse_group)
    for _ in range(2):  # the second time from what is kept
        elsewhere = duplicates.positives_elsewhere(found, parse_group, text_key, Store(str(tmp_path / "work")))
        lengths = [len(row) for block in range(len(found.blocks)) for row in elsewhere.reader(block)()]
        assert lengths == 30 * [5] + 3 * [1] and elsewhere.cut == 30
        monkeypatch.setattr(duplicates, "exchange", None)


def test_near_keys_are_equal_where_only_case_space_or_form_differ():
    assert near_key("Ein  Text\n") == near_key("ein text") == near_key("\ufb01".join(["ein text", ""])[:8])
    assert near_key("\ufb01x") == near_key("FIX") and near_key("C++") != near_key("C")
    assert text_key("Ein Text") != text_key("ein text")


def test_groups_are_no_more_than_a_task_can_have_results():
    assert [len(group) for group in in_groups(range(5), 2)] == [2, 2, 1]
    assert len(in_groups(range(100_000), 32)) <= GROUPS
    assert partial(in_groups, [], 2)() == []
