"""Plans fit the cluster, leave CPUs for reading, and messages name what would fit."""

import socket
import subprocess
import sys
import textwrap

import pytest

from raybge.cluster import connection, resources
from raybge.cluster.resources import Cluster, Plan, plan_workers
from raybge.util.errors import UserError


def machine(cpus, gpus=0, own=True, nodes=1):
    return of_nodes(*[(cpus, gpus)] * nodes, own=own)


def of_nodes(*nodes, own=False):
    cpus, gpus = zip(*nodes, strict=True)
    return Cluster(own, sum(cpus), sum(gpus), len(nodes), cpus, gpus)


@pytest.mark.parametrize(
    ("place", "flags", "workers", "cpus"),
    [
        (machine(2), {}, 1, 2),
        (machine(2), {"num_workers": "2"}, 2, 1),
        (machine(2), {"num_workers": "1", "cpus_per_worker": 2}, 1, 2),  # all cores: reading shares them
        (machine(1), {}, 1, 1),
        (machine(64), {}, 8, 8),
        (machine(4, own=False), {}, 1, 3),  # a cluster that others use: one CPU stays free to read
        (machine(8, own=False, nodes=2), {"cpus_per_worker": 8}, 1, 8),
        (machine(32, gpus=8), {}, 8, 1),
        (machine(32, gpus=8), {"num_workers": "4"}, 4, 5),
        (machine(32, gpus=8), {"use_gpu": False}, 4, 8),
        (of_nodes((16, 0), (8, 8)), {}, 8, 1),  # the head's CPUs carry no GPU worker
        (machine(4, own=False, nodes=2), {}, 1, 4),  # no node has 7, though 7 are left beside the reading
    ],
)
def test_defaults(place, flags, workers, cpus):
    plan = plan_workers(place, flags.get("num_workers"), flags.get("use_gpu"), flags.get("cpus_per_worker"))
    assert (plan.workers, plan.cpus) == (workers, cpus)
    assert plan.workers * plan.cpus <= place.worker_cpus


def test_actors_may_be_smaller():
    plan = plan_workers(machine(2), None, None, None, cores_a_worker=1)
    assert (plan.workers, plan.cpus) == (2, 1)


@pytest.mark.parametrize(
    ("place", "flags", "says"),
    [
        (machine(2), {"num_workers": "3"}, "at most --num_workers 2"),
        (machine(2, own=False), {"num_workers": "2"}, "leave 1 CPU for reading: at most --num_workers 1"),
        (machine(1, own=False), {}, "at least 2 CPUs"),
        (machine(2), {"cpus_per_worker": 3}, "a lower --cpus_per_worker"),
        (
            machine(4, own=False, nodes=4),
            {"cpus_per_worker": 8},
            "a lower --cpus_per_worker",
        ),  # no node has 8
        (machine(2), {"use_gpu": True}, "no GPU"),
        (machine(32, gpus=2), {"num_workers": "3"}, "only 2 GPUs"),
        (machine(2), {"num_workers": "0"}, "at least 1"),
        (machine(2), {"num_workers": "two"}, "found «two»"),
        (machine(2), {"num_workers": "1-4"}, "only raybge.train and raybge.pretrain accept"),
        (machine(2), {"num_workers": "4-2"}, "found «4-2»"),
        (machine(2), {"num_workers": "9" * 5000}, "at least 1"),  # more digits than Python reads
        (machine(2), {"cpus_per_worker": 0}, "at least 1"),
    ],
)
def test_requests_that_do_not_fit_are_refused(place, flags, says):
    with pytest.raises(UserError, match=says):
        plan_workers(place, flags.get("num_workers"), flags.get("use_gpu"), flags.get("cpus_per_worker"))


@pytest.mark.parametrize(
    ("place", "flags", "plan"),
    [
        (machine(8), "2-4", Plan(4, 2, 0, (2, 4))),
        (machine(3), "2-4", Plan(3, 1, 0, (2, 4))),
        (machine(32, gpus=3), "2-8", Plan(3, 7, 1, (2, 8))),
        (machine(8), "2-2", Plan(2, 4, 0)),
    ],
)
def test_an_elastic_run_has_as_many_workers_as_fit(place, flags, plan):
    assert plan_workers(place, flags, None, None, elastic=True) == plan
    if plan.range:
        assert plan.describe("worker").startswith(f"{flags.replace('-', ' to ')} workers of ")


def test_an_elastic_run_is_refused_if_its_fewest_workers_do_not_fit():
    with pytest.raises(UserError, match="3 workers of 1 CPU do not fit"):
        plan_workers(machine(2), "3-4", None, None, elastic=True)


def test_a_dead_head_is_not_joined(tmp_path, monkeypatch):
    """`ray start` leaves its address behind when it is killed."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    path = tmp_path / "ray" / "ray_current_cluster"
    path.parent.mkdir()
    assert connection._live_head() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        path.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert connection._live_head() == path.read_text()
    assert connection._live_head() is None


def test_the_address_file_is_where_ray_keeps_it():
    from ray._common.utils import get_ray_address_file

    assert get_ray_address_file(None) == str(connection.address_file())


@pytest.mark.parametrize(
    ("place", "plan", "share"),
    [(machine(2), Plan(2, 1, 0), 1), (machine(16), Plan(8, 2, 0), 0.5), (machine(8, own=False), Plan(2, 3, 0), 1)],
)
def test_reading_is_shared_evenly(place, plan, share, monkeypatch):
    """In total at most the free CPUs: a paused reading task of one worker cannot block another worker's."""
    monkeypatch.setattr(resources, "available_cores", lambda: place.cpus)
    assert resources.reading_cpus(place, plan) == share


@pytest.mark.parametrize(
    ("place", "cpus", "reading"),
    [
        (machine(64, 8, own=False), 5, 3),  # it was 7 and 1
        (machine(192, 8, own=False), 8, 16),
        (machine(96, 8, own=False, nodes=4), 8, 4),
        (machine(64, 8, own=False, nodes=4), 5, 3),
        (machine(8, 1, own=False, nodes=8), 5, 3),
        (machine(192, 8, own=False, nodes=64), 8, 16),
        (machine(4, 1, own=False, nodes=8), 1, 3),
        (machine(2, 1, own=False, nodes=8), 1, 1),  # too few CPUs for both
        (machine(8, 8, own=False, nodes=2), 1, None),  # no CPU is left: 16 workers do not fit
        (machine(64, 8), 5, 5),  # with the slots of a Ray that raybge starts
    ],
    ids=lambda value: value.describe() if isinstance(value, Cluster) else None,
)
def test_a_gpu_has_cpus_to_read_with(place, cpus, reading, monkeypatch):
    """The reading of a GPU has 3 CPUs wherever its node has more."""
    monkeypatch.setattr(resources, "available_cores", lambda: place.cpus)
    if reading is None:
        with pytest.raises(UserError, match="leave 1 CPU for reading: at most --num_workers 15"):
            plan_workers(place, None, None, None)
        return
    plan = plan_workers(place, None, None, None)
    assert (plan.workers, plan.cpus, plan.gpus) == (place.gpus, cpus, 1)
    assert resources.reading_cpus(place, plan) == reading


@pytest.mark.alone  # starts Rays of its own
def test_ray_is_started_and_stopped_and_a_missing_cluster_is_named():
    """In a separate process, since Ray starts and stops."""
    code = textwrap.dedent(
        """
        import ray
        from raybge.cluster.connection import connect
        from raybge.cluster.resources import available_cores
        from raybge.util.errors import UserError

        with connect() as cluster:
            assert cluster.own and cluster.cpus == available_cores()
            assert ray.cluster_resources()["CPU"] > available_cores()
            with connect() as inner:  # the outer one stays, and its slots for reading are not for workers
                assert inner == cluster
            assert ray.is_initialized()
        assert not ray.is_initialized()
        ray.init(address="local", num_cpus=3)
        with connect() as joined:
            assert not joined.own and joined.cpus == 3
        assert ray.is_initialized()
        ray.shutdown()
        try:
            with connect("127.0.0.1:1"):
                pass
        except UserError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "cannot join the Ray cluster at 127.0.0.1:1" in done.stdout
