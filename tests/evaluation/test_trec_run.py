"""The scores of a run file: trec_eval keeps the order, whatever ties."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from raybge.evaluation.trec_run import decreasing_scores, run_lines

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-45, -1e-45, 1e30, -1e30]), st.floats(-(2.0**99), 2.0**99, width=32)
)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_scores_decrease_strictly_and_no_more_than_needed(numbers):
    scores = np.sort(np.array([numbers], np.float32))[:, ::-1]
    expected = [scores[0, 0]]
    for score in scores[0, 1:]:
        expected.append(min(score, np.nextafter(expected[-1], np.float32(-np.inf))))
    actual = decreasing_scores(scores)
    assert actual.dtype == np.float32 and actual[0].tolist() == [float(each) for each in expected]
    assert (np.diff(actual.astype(np.float64)) < 0).all()


@pytest.mark.parametrize(
    "scores",
    [
        [0.5] * 30,
        [0.0, -0.0] * 15,
        np.linspace(1e-44, -1e-44, 30),
        0.7 + np.linspace(1e-9, 0, 30),  # differences below 32-bit precision
        [3e38] * 15 + [-1e38] * 15,
        np.repeat(np.linspace(1, -1, 10), 3),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_trec_eval_orders_the_lines_as_they_are(scores, seed):
    """Each document's reciprocal rank, with it as the only relevant one, is 1 / its position in the file."""
    names = [f"d{number}" for number in np.random.default_rng(seed).permutation(30)]
    lines = run_lines(["q"], np.arange(30)[None], np.array([scores], np.float32), dict(enumerate(names))).decode()
    assert [line.split()[3] for line in lines.splitlines()] == [str(rank) for rank in range(1, 31)]
    run = pytrec_eval.parse_run(lines.splitlines())
    for position, name in enumerate(names, start=1):
        values = pytrec_eval.RelevanceEvaluator({"q": {name: 1}}, {"recip_rank"}).evaluate(run)
        assert values["q"]["recip_rank"] == pytest.approx(1 / position)


def test_empty_ranks_have_no_line():
    ids, scores = np.array([[4, -1], [-1, -1]]), np.array([[0.5, -np.inf], [-np.inf, -np.inf]], np.float32)
    assert run_lines(["a", 7], ids, scores, {4: "d"}) == b"a Q0 d 1 0.5 raybge\n"
