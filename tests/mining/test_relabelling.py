"""Relabelling of one row, by scores and by grades."""

import copy

import pytest

from raybge.data.groups import parse_scored_group
from raybge.mining.relabelling import RelabelSpec, RelabelStatistics, relabel_by_grades, relabel_by_scores

ROW = {"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2", "n3"], "id": 7}
SCORED = {**ROW, "pos_scores": [1.0, 2.0], "neg_scores": [2.5, -3.0, 2.0]}


def by_scores(action, margin=0.0, row=SCORED):
    raw, statistics = copy.deepcopy(row), RelabelStatistics()
    relabel_by_scores(raw, RelabelSpec(action, margin), statistics)
    parse_scored_group(raw)
    return raw, statistics


def by_grades(action, grades, row=ROW):
    raw, statistics = copy.deepcopy(row), RelabelStatistics()
    relabel_by_grades(raw, grades, RelabelSpec(action), statistics)
    return raw, statistics


def test_scores_above_the_best_positive():
    assert by_scores("drop")[0] == {**SCORED, "neg": ["n2", "n3"], "neg_scores": [-3.0, 2.0]}
    promoted = {
        "pos": ["p1", "p2", "n1"],
        "pos_scores": [1.0, 2.0, 2.5],
        "neg": ["n2", "n3"],
        "neg_scores": [-3.0, 2.0],
    }
    assert by_scores("promote")[0] == {**SCORED, **promoted}
    assert by_scores("soft")[0] == {**SCORED, "neg_scores": [2.0, -3.0, 2.0]}


@pytest.mark.parametrize(
    ("margin", "left"), [(-9.0, []), (-0.1, ["n2"]), (0.0, ["n2", "n3"]), (0.5, ROW["neg"]), (9.0, ROW["neg"])]
)
def test_margin(margin, left):
    raw, statistics = by_scores("drop", margin)
    assert raw["neg"] == left and statistics.relabelled == 3 - len(left)
    assert statistics.rows == (len(left) < 3) and statistics.rows_without_negatives == (not left)
    assert by_scores("soft", margin)[0]["neg"] == ROW["neg"]


def test_soft_labels_below_the_positive_rise_to_it():
    assert by_scores("soft", -9.0)[0]["neg_scores"] == [2.0, 2.0, 2.0]


def test_texts_in_place_of_lists():
    row = {"query": "q", "pos": "p", "neg": "n", "pos_scores": [0.0], "neg_scores": [1.0]}
    assert by_scores("promote", row=row)[0] == {
        **{"query": "q", "pos": ["p", "n"], "neg": []},
        **{"pos_scores": [0.0, 1.0], "neg_scores": []},
    }
    assert by_grades("promote", [3], {"query": "q", "pos": "p", "neg": ["n"]})[0]["pos"] == ["p", "n"]


def test_grades():
    assert by_grades("drop", [2, 1, 3])[0] == {**ROW, "neg": ["n2"]}
    assert by_grades("promote", [2, 1, 3])[0] == {**ROW, "pos": ["p1", "p2", "n1", "n3"], "neg": ["n2"]}
    assert by_grades("soft", [2, 1, 3])[0] == {**ROW, "pos_scores": [3.0, 3.0], "neg_scores": [2.0, 1.0, 3.0]}
    assert by_grades("drop", [2, 1, 1], SCORED)[0] == {**SCORED, "neg": ["n2", "n3"], "neg_scores": [-3.0, 2.0]}


@pytest.mark.parametrize("action", ["drop", "promote"])
def test_a_row_without_a_judgment_is_as_it_was(action):
    raw, statistics = by_grades(action, None)
    assert raw == ROW and statistics == RelabelStatistics(rows_failed=1)


def test_a_row_without_a_judgment_gets_the_scores_of_its_labels():
    raw, statistics = by_grades("soft", None)
    assert raw == {**ROW, "pos_scores": [3.0, 3.0], "neg_scores": [0.0, 0.0, 0.0]} and statistics.rows_failed == 1
    assert parse_scored_group(raw)


def test_statistics_add_up():
    total = RelabelStatistics()
    for statistics in (by_scores("drop")[1], by_grades("drop", [3, 3, 3])[1], by_grades("drop", None)[1]):
        total.add(statistics)
    assert total.counts() == {
        "negatives_judged": 6,
        "negatives_relabelled": 4,
        "rows_relabelled": 2,
        "rows_without_negatives": 1,
        "rows_not_judged": 1,
    }
    assert [each["verdict"] for each in total.examples] == ["score 2.5, best positive 2", "grade 3 of 3"]
    assert total.examples[0]["negative"] == "n1" and total.examples[0]["positive"] == "p1"
