"""Deduplication and shared positives: the steps of the shuffle, run in a loop instead of on Ray."""

import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_shuffle import use_local_shuffle

from raybge.cli.console import Console
from raybge.cluster.shuffle import GROUPS, in_groups
from raybge.data.groups import id_key, near_key, parse_document, parse_group, parse_passage, text_key
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.search import deduplication
from raybge.search.deduplication import deduplicate
from raybge.search.id_conflicts import check_id_conflicts
from raybge.search.key_table import key_words
from raybge.search.search_data import Passages, single_passage
from raybge.search.store import Store
from raybge.util.errors import UserError
from raybge.util.plural import plural


@pytest.fixture
def local_exchange(monkeypatch):
    use_local_shuffle(monkeypatch)


def survey_of(folder, rows, parse, block_bytes=150):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return survey(list_files(str(path), "--input_file"), block_bytes, parse)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_first_occurrence_of_each_key_is_kept(keys):
    first = deduplication.first_of_each(np.array(keys, np.uint64).reshape(-1, 2))
    assert first.tolist() == [key not in keys[:i] for i, key in enumerate(keys)]


def test_first_occurrence_is_kept_for_any_partition(tmp_path, local_exchange):
    texts = [f"passage {i * i % 17}" for i in range(60)]
    pool_survey = survey_of(tmp_path, [{"text": text} for text in texts], parse_passage)
    store = Store(str(tmp_path / "work"))
    unique = deduplication.deduplicate(pool_survey, parse_passage, single_passage, store)
    assert (
        len(unique.groups) > 3 and unique.total_B.sum() == 60 and unique.total_B.tolist() == pool_survey.rows.tolist()
    )
    flags = [flag for block in range(len(pool_survey.blocks)) for flag in unique.reader(block)().tolist()]
    assert flags == [text not in texts[:i] for i, text in enumerate(texts)]
    assert (unique.passages, unique.duplicates) == (len(set(texts)), 60 - len(set(texts)))


DOCUMENTS = [{"_id": f"d{i % 11}", "text": f"text {i % 11}" if i % 5 else "text"} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "conflicts"),
    [
        # row, earlier row: of the first rows of "d0" to "d10", those of "d0", "d5" and "d10" have the text "text"
        (DOCUMENTS, None),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], [(1, 0)]),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "x"}, {"id": "a", "contents": "x"}], []),
        ([{"_id": "a", "title": "x", "text": "y"}, {"_id": "a", "title": "", "text": "y"}], [(1, 0)]),
        ([{"_id": 1, "text": "x"}, {"_id": "1", "text": "y"}, {"_id": 1, "text": "x"}], [(1, 0)]),
        (
            [{"_id": i, "text": "x"} for i in range(30)] + [{"_id": 3, "text": "y"}] * 20,
            [(30 + i, 3) for i in range(20)],
        ),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}, {"_id": "a", "text": "z"}], [(1, 0), (2, 0)]),
    ],
)
def test_documents_of_one_id_with_different_texts(tmp_path, local_exchange, rows, conflicts, capsys):
    """They are located, for any partition, and the first one stays."""
    first: dict[str, tuple[int, str]] = {}
    slow = []
    for number, row in enumerate(rows):
        document = parse_document(row)
        earlier, text = first.setdefault(document.id, (number, document))
        if text != document:
            slow.append((number, earlier))
    assert conflicts in (slow, None) and (conflicts is not None or len(slow) > 10)
    documents = survey_of(tmp_path, rows, parse_document, 80)
    store = Store(str(tmp_path / "work"))
    for _ in range(2):  # the second time from the store
        unique = deduplicate(documents, parse_document, single_passage, store, id_key, compare_texts=True)
        flags = [flag for block in range(len(documents.blocks)) for flag in unique.reader(block)().tolist()]
        assert np.flatnonzero(flags).tolist() == [number for number, _ in first.values()]
        assert unique.conflict_count == len(slow)
    passages = Passages(documents, parse_document, single_passage, id_key)
    path = tmp_path / "rows.jsonl"
    lines = [
        f"{path}:{number + 1}: document {parse_document(rows[number]).id} has another text in {path}:{earlier + 1}"
        for number, earlier in slow
    ]
    lines[10:] = [f"and {len(slow) - 10:,} more"] if len(slow) > 10 else []
    check_id_conflicts(passages, unique, "--corpus_data", "skip", Console())
    title = f"--corpus_data: {plural(len(slow), 'row')} skipped, whose id an earlier row has"
    assert capsys.readouterr().out.splitlines() == ([title, *lines] if slow else [])
    if slow:
        with pytest.raises(UserError) as error:
            check_id_conflicts(passages, unique, "--corpus_data", "stop", Console())
        assert str(error.value).splitlines()[:-1] == lines and "--on_bad_rows skip" in str(error.value)


def test_second_start_reads_stored_result(tmp_path, local_exchange, monkeypatch):
    pool_survey = survey_of(tmp_path, [{"text": f"passage {i % 7}"} for i in range(40)], parse_passage)
    store = Store(str(tmp_path / "work"))
    first = deduplication.deduplicate(pool_survey, parse_passage, single_passage, store)
    monkeypatch.setattr(deduplication, "exchange", None)
    second = deduplication.deduplicate(pool_survey, parse_passage, single_passage, store)
    assert second.unique_B.tolist() == first.unique_B.tolist() and second.total_B.tolist() == first.total_B.tolist()


def test_repeated_query_gets_positives_of_all_its_rows(tmp_path, local_exchange):
    rows = [{"query": f"query {i % 20}", "pos": [f"positive {i}", f"positive {i % 3}"]} for i in range(50)]
    rows += [{"query": "alone", "pos": ["p"]}, {"query": "QUERY  3", "pos": ["other case"]}]
    rows_survey = survey_of(tmp_path, rows, parse_group)
    shared = deduplication.find_shared_positives(rows_survey, parse_group, near_key, Store(str(tmp_path / "work")))
    assert len(shared.groups) > 3
    keys = [row for block in range(len(rows_survey.blocks)) for row in shared.reader(block)()]
    for row, known in zip(rows, keys, strict=True):
        same = [other for other in rows if other["query"].lower().split() == row["query"].lower().split()]
        expected = {near_key(text) for other in same for text in other["pos"]} if len(same) > 1 else set()
        assert sorted(map(tuple, known.tolist())) == sorted(map(tuple, key_words(list(expected)).tolist()))


def test_positives_of_a_repeated_query_are_bounded(tmp_path, local_exchange, monkeypatch):
    monkeypatch.setattr(deduplication, "MAX_SHARED_POSITIVES", 5)
    rows = [{"query": "q", "pos": [f"positive {i}"]} for i in range(30)] + 3 * [{"query": "r", "pos": ["p"]}]
    rows_survey = survey_of(tmp_path, rows, parse_group)
    for _ in range(2):  # the second time from the store
        shared = deduplication.find_shared_positives(rows_survey, parse_group, text_key, Store(str(tmp_path / "work")))
        lengths = [len(row) for block in range(len(rows_survey.blocks)) for row in shared.reader(block)()]
        assert lengths == 30 * [5] + 3 * [1] and shared.truncated_rows == 30
        monkeypatch.setattr(deduplication, "exchange", None)


def test_near_keys_ignore_case_space_and_unicode_form():
    assert near_key("Ein  Text\n") == near_key("ein text") == near_key("\ufb01".join(["ein text", ""])[:8])
    assert near_key("\ufb01x") == near_key("FIX") and near_key("C++") != near_key("C")
    assert text_key("Ein Text") != text_key("ein text")


def test_number_of_groups_is_bounded():
    assert [len(group) for group in in_groups(range(5), 2)] == [2, 2, 1]
    assert len(in_groups(range(100_000), 32)) <= GROUPS
    assert partial(in_groups, [], 2)() == []
