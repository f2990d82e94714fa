"""Queries that the page of an evaluation shows: selected by hand from known rankings, and read from a store."""

import json

import numpy as np
import pyarrow as pa
import pytest

from raybge.evaluation.query_examples import PassageHit
from raybge.evaluation.ranking_examples import MeasuredModel, QueryRankings, ranking_examples
from raybge.search.store import EncodedBlock, Store

# Of six queries: values of nDCG@10 and ranks of the first relevant passage, 0 if it was not retrieved.
VALUES, RANKS = [1.0, 0.0, 0.5, 0.0, 0.3, 0.0], [1, 40, 3, 0, 5, 12]
OTHER = [1.0, 0.9, 0.5, 0.0, 0.1, 0.0]
NAMES = [f"q{i}" for i in range(6)]


@pytest.fixture
def store(tmp_path):
    """Queries in blocks of 4 and 2, ten passages in blocks of 7 and 3."""
    store = Store(str(tmp_path))
    queries = [json.dumps({"query": name, "pos": [f"answer of {name}"]}) for name in NAMES]
    passages = [f"passage {i}" for i in range(10)]
    for name, texts in {"qa": queries[:4], "qb": queries[4:], "pa": passages[:7], "pb": passages[7:]}.items():
        store.write_table(name, pa.table({"text": texts}))
    return store


def model(values, metric="nDCG@10"):
    """Query i retrieves passages i, i + 1, i + 2; its answer is passage i + 3, which only the last query lacks."""
    ids_QK = np.array([[i, i + 1, i + 2] for i in range(6)])
    answer_Q = np.array([3, 4, 5, 6, 7, -1])
    rankings = QueryRankings(ids_QK, np.zeros((6, 3), bool), np.array(RANKS), answer_Q)
    queries = [EncodedBlock("qa", 4), EncodedBlock("qb", 2)]
    passages = [EncodedBlock("pa", 7), EncodedBlock("pb", 3)]
    return MeasuredModel({metric: np.array(values)}, rankings, queries, passages)


def test_the_worst_queries_are_those_whose_answers_rank_lowest(store):
    examples = ranking_examples(store, [model(VALUES)])
    assert [each.query for each in examples.worst] == ["q3", "q1", "q5", "q4", "q2"]  # not q0, which is perfect
    assert [(each.after, each.rank_after) for each in examples.worst[:3]] == [(0.0, None), (0.0, 40), (0.0, 12)]
    assert all(each.before is None and not each.hits_before for each in examples.worst)
    assert (examples.metric, examples.changed) == ("nDCG@10", [])


def test_texts_are_those_of_the_rows(store):
    worst = {each.query: each for each in ranking_examples(store, [model(VALUES)]).worst}
    assert worst["q4"].hits_after == [PassageHit(f"passage {i}", False) for i in (4, 5, 6)]
    assert worst["q4"].answer == "passage 7" and worst["q3"].answer == "passage 6"
    assert worst["q5"].answer == "answer of q5"  # the corpus lacks it


def test_the_largest_differences_of_two_models(store):
    changed = ranking_examples(store, [model(VALUES), model(OTHER)]).changed
    assert [(each.query, each.before, each.after) for each in changed] == [("q1", 0.9, 0.0), ("q4", 0.1, 0.3)]
    assert changed[0].rank_before == changed[0].rank_after == 40 and len(changed[0].hits_before) == 3


def test_another_metric_takes_the_place_of_a_missing_one(store):
    assert ranking_examples(store, [model(VALUES, "nDCG@1")]).metric == "nDCG@1"


def test_an_error_is_logged_and_ends_there(tmp_path, capsys):
    assert ranking_examples(Store(str(tmp_path / "gone")), [model(VALUES)]) is None
    assert "Traceback" in capsys.readouterr().err


def test_rankings_are_summarized_and_joined():
    ids_QK = np.array([[7, 3, 5, 9], [2, -1, -1, -1]])
    relevant = [{9: 2, 1: 1, 4: 0}, {6: 0}]
    relevant_QK = np.array([[False, False, False, True], [False] * 4])
    rankings = QueryRankings.of(ids_QK, relevant_QK, relevant)
    assert rankings.top_QK.tolist() == [[7, 3, 5], [2, -1, -1]] and not rankings.relevant_QK.any()
    assert rankings.rank_Q.tolist() == [4, 0] and rankings.answer_Q.tolist() == [9, -1]
    joined = QueryRankings.concatenate([rankings, rankings])
    assert joined.rank_Q.tolist() == [4, 0, 4, 0] and joined.top_QK.shape == (4, 3)
