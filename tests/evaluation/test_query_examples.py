"""Selection of the example queries that reports show."""

import numpy as np
import pytest

from raybge.evaluation.query_examples import select_queries


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.1, -0.2, 0, 0.3], [3, 1, 0, 2]),
        ([i / 100 for i in range(1, 31)], list(range(29, 9, -1))),
        ([-i / 100 for i in range(1, 31)], list(range(29, 9, -1))),
        ([0.5] * 15 + [-0.1] * 15, list(range(10)) + list(range(15, 25))),
        ([0.5] * 28 + [-0.1] * 2, [*range(18), 28, 29]),
    ],
)
def test_largest_gains_and_losses_are_selected(changes, expected):
    after = np.array(changes)
    assert select_queries(0 * after, after) == expected
