"""Detection of stalled workers from their heartbeats; real workers that stall are in test_stalls.py."""

import threading

import pytest

from raybge.training.health.heartbeat import Heartbeat, HeartbeatRecord, describe_stall
from raybge.util.activity import (
    DONE,
    READING,
    STARTING,
    Activity,
    activity,
    collective,
    current_activity,
    reset_activity,
    set_activity,
)

WORKER_1 = "worker 1 (10.0.0.1, pid 101) "
STEP, GATHER = ("step 5", 7, False), ("gathering", 8, True)  # name, collectives, is_collective
READ, START, END = (READING, 7, False), (STARTING, 0, False), (DONE, 9, False)


def heartbeats(*workers: tuple[tuple[str, int, bool], float, float]) -> list[HeartbeatRecord]:
    """Build the heartbeats of workers, each ((name, collectives, is_collective), seconds, age)."""
    return [
        HeartbeatRecord(rank, "10.0.0.1", 100 + rank, Activity(name, 0.0, collectives, is_collective), seconds, age)
        for rank, ((name, collectives, is_collective), seconds, age) in enumerate(workers)
    ]


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (((GATHER, 9, 1), (GATHER, 9, 1)), None),  # not yet
        (((GATHER, 11, 1), (STEP, 12, 1)), WORKER_1 + "has been in step 5 for 13 s; 1 wait in gathering"),
        (((GATHER, 11, 0), (STEP, 2, 12)), WORKER_1 + "has sent no heartbeat for 12 s; 1 wait in gathering"),
        (((STEP, 2, 12), (STEP, 2, 0)), "worker 0 (10.0.0.1, pid 100) has sent no heartbeat"),  # nobody waits
        (((GATHER, 11, 0), (READ, 12, 0)), WORKER_1 + "has been waiting for data for 12 s"),
        (  # the network
            ((GATHER, 11, 0), (GATHER, 11, 0)),
            "all 2 workers send heartbeats, but none makes progress; 2 wait in gathering",
        ),
        (((STEP, 99, 0), (STEP, 99, 0)), None),  # a long step on all workers
        (((GATHER, 11, 0), (START, 99, 0)), None),
        (((GATHER, 11, 0), (START, 2, 12)), WORKER_1 + "has sent no heartbeat for 12 s"),
        (((STEP, 11, 0), (END, 99, 99)), None),
    ],
)
def test_stalled_worker_is_named(workers, message):
    actual = describe_stall(heartbeats(*workers), timeout=10)
    assert actual is None if message is None else actual and actual.startswith(message)


def test_number_of_named_workers_is_limited():
    message = describe_stall(heartbeats((GATHER, 11, 0), *[(STEP, 11, 0)] * 9), timeout=10)
    assert message.count("pid") == 3 and "and 6 more" in message


def test_long_backward_pass_counts_as_waiting_only_if_a_worker_is_behind():
    """It contains collectives, but may also be long by itself."""
    backward = Activity("the backward pass of step 5", 0.0, 8, has_collective=True)
    both = [HeartbeatRecord(rank, "a", rank, backward, 11) for rank in (0, 1)]
    behind = HeartbeatRecord(1, "a", 1, Activity("step 5", 0.0, 7), 11)
    assert describe_stall(both, timeout=10) is None
    assert "worker 1 (a, pid 1) has been in step 5" in describe_stall([both[0], behind], timeout=10)


def test_activity_of_nested_blocks():
    def current() -> tuple[str, int, bool]:
        now = current_activity()
        return now.name, now.collectives, now.is_collective

    reset_activity()
    set_activity("step 1")
    with activity("an evaluation"):
        with collective("gathering"):
            assert current() == ("gathering", 1, True)
        assert current() == ("an evaluation", 1, False)
    assert current() == ("step 1", 1, False)


def test_first_heartbeat_is_sent_at_once():
    """A worker that freezes before its first heartbeat would not be known to have stalled."""
    records, received = [], threading.Event()

    class State:
        def add_heartbeat(self, record: HeartbeatRecord) -> None:
            records.append(record)
            received.set()

    with Heartbeat(State(), 1, "10.0.0.2", timeout=1000.0):
        assert received.wait(10)
        assert [record.activity.name for record in records] == [STARTING]
    assert records[-1].activity.name == DONE
