"""A cluster that starts machines when asked: Ray's own autoscaler, with machines that are processes."""

import json
import textwrap

import hosts
import pytest
from clusters import ROOT

from raybge.cluster import autoscaling
from raybge.cluster.autoscaling import wait_for_capacity
from raybge.cluster.resources import Cluster
from raybge.util.errors import UserError

EMPTY = Cluster(own=False, cpus=0, gpus=0, nodes=1, node_cpus=(0,), node_gpus=(0,))
LARGE = Cluster(own=False, cpus=16, gpus=2, nodes=3, node_cpus=(0, 8, 8), node_gpus=(0, 1, 1))


@pytest.fixture
def cloud(monkeypatch):
    """What was asked for, and what a look finds each time; the last one stays. A second passes in each look."""
    asked, finds, clock = [], [], iter(range(10_000))

    def look(own):
        return finds.pop(0) if len(finds) > 1 else finds[0]

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(autoscaling, "read_cluster", look)
    monkeypatch.setattr(autoscaling, "is_autoscaling", lambda: True)
    monkeypatch.setattr(autoscaling, "machines_are_starting", lambda: False)
    monkeypatch.setattr(autoscaling.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(autoscaling.time, "monotonic", lambda: next(clock))
    return asked, finds


def test_machines_are_asked_for_and_the_wish_is_taken_back(cloud):
    asked, finds = cloud
    finds += [EMPTY, LARGE]
    said = []
    assert wait_for_capacity(EMPTY, "2", True, 4, said.append) == LARGE
    assert asked == [[{"CPU": 4, "GPU": 1}] * 2 + [{"CPU": 1}], []]
    assert "room for 0 of 2 workers" in said[0]


def test_as_many_as_runs_side_by_side_need(cloud):
    asked, finds = cloud
    finds += [EMPTY, LARGE]
    assert wait_for_capacity(EMPTY, "1", None, 4, print, runs=3) == LARGE
    assert asked[0] == [{"CPU": 4}] * 3 + [{"CPU": 1}] * 3


def test_what_is_there_is_not_asked_for(cloud):
    asked, _ = cloud
    assert wait_for_capacity(LARGE, "2", None, 4, print) == LARGE and wait_for_capacity(LARGE, None, None, None, print) == LARGE
    assert not asked


def test_when_nothing_comes_the_plan_is_made_with_what_there_is(cloud):
    asked, finds = cloud
    finds.append(EMPTY)
    assert wait_for_capacity(EMPTY, "2", None, None, print) == EMPTY
    assert asked[-1] == []


def test_an_empty_cluster_wants_a_number(cloud):
    with pytest.raises(UserError, match="--num_workers: this cluster starts machines on request"):
        wait_for_capacity(EMPTY, None, None, None, print)


def test_other_clusters_are_left_as_they_are(cloud, monkeypatch):
    monkeypatch.setattr(autoscaling, "is_autoscaling", lambda: False)
    assert wait_for_capacity(EMPTY, "2", None, None, print) == EMPTY
    assert not cloud[0]


# --- Ray's autoscaler -----------------------------------------------------------------------------------------------

HEAD = "f" * 51 + "00000"  # as Ray's provider of fake machines calls the head

PROGRAM = """
    import ray
    from raybge.cluster.autoscaling import wait_for_capacity
    from raybge.cluster.connection import connect
    from raybge.cluster.resources import plan_workers

    with connect("auto") as cluster:
        assert (cluster.nodes, cluster.cpus) == (1, 0), cluster
        found = wait_for_capacity(cluster, "3", None, 1, print)
        assert found.nodes == 3 and plan_workers(found, "3", None, 1).workers == 3, found
        print("has", found.nodes)
"""


def config() -> dict:
    """Machines of 2 CPUs, from 0 to 4."""
    nothing: dict = {name: {} for name in ("docker", "auth", "file_mounts")}
    nothing |= {name: [] for name in ("cluster_synced_files", "initialization_commands", "setup_commands")}
    for kind in ("head", "worker"):
        nothing |= {f"{kind}_setup_commands": [], f"{kind}_start_ray_commands": []}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "launch_multiple": True, "head_node_id": HEAD}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    types = {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}}
    types["worker"] = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 4}
    about = {"cluster_name": "grows", "max_workers": 4, "idle_timeout_minutes": 5, "provider": provider}
    return {**nothing, **about, "available_node_types": types, "head_node_type": "ray.head.default"}


def test_rays_autoscaler_brings_the_machines(tmp_path):
    if why := hosts.missing():
        pytest.skip(f"Ray's fake machines need processes of their own to be ended with ({why})")
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / "grow.py").write_text(textwrap.dedent(PROGRAM))
    script = f"""
        ray start --head --num-cpus=0 --autoscaling-config={tmp_path}/config.json --object-store-memory=100000000
        python {tmp_path}/grow.py
    """
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_AUTH_MODE": "disabled"}
    done = hosts.run_alone(script, tmp_path, **fake, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "has 3" in done.stdout, done.stdout
