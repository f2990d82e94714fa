"""Who is missing, from what the workers say; real workers that stand still are in test_stuck.py."""

import pytest

from raybge.training.health.heartbeat import Pulse, stalled
from raybge.util.activity import DONE, READING, STARTING, Place, at, begin, collective, during, here

WORKER_1 = "worker 1 (10.0.0.1, pid 101) "
STEP, GATHER = ("step 5", 7, False), ("gathering", 8, True)


def pulses(*told: tuple[tuple[str, int, bool], float, float]) -> list[Pulse]:
    """Each ((doing, collectives, waits), seconds, heard)."""
    return [
        Pulse(rank, "10.0.0.1", 100 + rank, Place(doing, 0.0, collectives, waits), seconds, heard)
        for rank, ((doing, collectives, waits), seconds, heard) in enumerate(told)
    ]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (((GATHER, 9, 1), (GATHER, 9, 1)), None),  # not yet
        (
            ((GATHER, 11, 1), (STEP, 12, 1)),
            WORKER_1 + "has been in step 5 for 13 s; 1 wait in gathering",
        ),
        (((GATHER, 11, 0), (STEP, 2, 12)), WORKER_1 + "has not been heard of for 12 s; 1 wait in gathering"),
        (((STEP, 2, 12), (STEP, 2, 0)), "worker 0 (10.0.0.1, pid 100) has not been heard of"),  # alone
        (
            ((GATHER, 11, 0), ((READING, 7, False), 12, 0)),
            WORKER_1 + "has been waiting for data for 12 s",
        ),
        (((GATHER, 11, 0), (GATHER, 11, 0)), "none of the 2 workers is missing; 2 wait in gathering"),  # the network
        (((STEP, 99, 0), (STEP, 99, 0)), None),  # a long step of all
        (((GATHER, 11, 0), ((STARTING, 0, False), 99, 0)), None),
        (((GATHER, 11, 0), ((STARTING, 0, False), 2, 12)), WORKER_1 + "has not been heard of for 12 s"),
        (((STEP, 11, 0), ((DONE, 9, False), 99, 99)), None),
    ],
)
def test_who_is_missing(told, says):
    found = stalled(pulses(*told), timeout=10)
    assert found is None if says is None else found and found.startswith(says)


def test_the_names_are_few():
    found = stalled(pulses((GATHER, 11, 0), *[(STEP, 11, 0)] * 9), timeout=10)
    assert found.count("pid") == 3 and "and 6 more" in found


def test_a_backward_pass_is_waited_for_only_where_someone_is_behind():
    """It may as well be long by itself."""
    backward = Place("the backward pass of step 5", 0.0, 8, shared=True)
    both = [Pulse(rank, "a", rank, backward, 11) for rank in (0, 1)]
    behind = Pulse(1, "a", 1, Place("step 5", 0.0, 7), 11)
    assert stalled(both, timeout=10) is None
    assert "worker 1 (a, pid 1) has been in step 5" in stalled([both[0], behind], timeout=10)


def test_whereabouts_of_nested_blocks():
    begin()
    at("step 1")
    with during("an evaluation"):
        with collective("gathering"):
            assert (here().doing, here().collectives, here().waits) == ("gathering", 1, True)
        assert (here().doing, here().collectives, here().waits) == ("an evaluation", 1, False)
    assert (here().doing, here().collectives) == ("step 1", 1)
