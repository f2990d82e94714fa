"""Clusters that start machines on request: simulated, and Ray's own autoscaler with processes as machines."""

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
    """Return the requests, and the views of the cluster: each read takes the next one, and a second; the last stays."""
    requests, views, clock = [], [], iter(range(10_000))

    def read_cluster(own):
        return views.pop(0) if len(views) > 1 else views[0]

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(autoscaling, "read_cluster", read_cluster)
    monkeypatch.setattr(autoscaling, "is_autoscaling", lambda: True)
    monkeypatch.setattr(autoscaling, "machines_are_starting", lambda: False)
    monkeypatch.setattr(autoscaling.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(autoscaling.time, "monotonic", lambda: next(clock))
    return requests, views


def test_machines_are_requested_and_the_request_is_withdrawn(cloud):
    requests, views = cloud
    views += [EMPTY, LARGE]
    lines = []
    assert wait_for_capacity(EMPTY, "2", True, 4, lines.append) == LARGE
    assert requests == [[{"CPU": 4, "GPU": 1}] * 2 + [{"CPU": 1}], []]
    assert "room for 0 of 2 workers" in lines[0]


def test_machines_for_concurrent_runs_are_requested(cloud):
    requests, views = cloud
    views += [EMPTY, LARGE]
    assert wait_for_capacity(EMPTY, "1", None, 4, print, runs=3) == LARGE
    assert requests[0] == [{"CPU": 4}] * 3 + [{"CPU": 1}] * 3


def test_sufficient_cluster_requests_nothing(cloud):
    requests, _ = cloud
    assert (
        wait_for_capacity(LARGE, "2", None, 4, print) == LARGE
        and wait_for_capacity(LARGE, None, None, None, print) == LARGE
    )
    assert not requests


def test_plan_uses_the_present_machines_if_none_starts(cloud):
    requests, views = cloud
    views.append(EMPTY)
    assert wait_for_capacity(EMPTY, "2", None, None, print) == EMPTY
    assert requests[-1] == []


def test_empty_cluster_requires_a_number_of_workers(cloud):
    with pytest.raises(UserError, match="--num_workers: this cluster starts machines on request"):
        wait_for_capacity(EMPTY, None, None, None, print)


def test_cluster_without_autoscaling_requests_nothing(cloud, monkeypatch):
    monkeypatch.setattr(autoscaling, "is_autoscaling", lambda: False)
    assert wait_for_capacity(EMPTY, "2", None, None, print) == EMPTY
    assert not cloud[0]


# --- Ray's autoscaler -----------------------------------------------------------------------------------------------

HEAD = "f" * 51 + "00000"  # name of the head in Ray's provider of fake machines

PROGRAM = """
    import ray
    from raybge.cluster.autoscaling import wait_for_capacity
    from raybge.cluster.connection import connect
    from raybge.cluster.resources import plan_workers

    with connect("auto") as cluster:
        assert (cluster.nodes, cluster.cpus) == (1, 0), cluster
        grown = wait_for_capacity(cluster, "3", None, 1, print)
        assert grown.nodes == 3 and plan_workers(grown, "3", None, 1).workers == 3, grown
        print("has", grown.nodes)
"""


def config() -> dict:
    """Return a cluster configuration with 0 to 4 machines of 2 CPUs."""
    empty: dict = {name: {} for name in ("docker", "auth", "file_mounts")}
    empty |= {name: [] for name in ("cluster_synced_files", "initialization_commands", "setup_commands")}
    for kind in ("head", "worker"):
        empty |= {f"{kind}_setup_commands": [], f"{kind}_start_ray_commands": []}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "launch_multiple": True, "head_node_id": HEAD}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    types = {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}}
    types["worker"] = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 4}
    settings = {"cluster_name": "grows", "max_workers": 4, "idle_timeout_minutes": 5, "provider": provider}
    return {**empty, **settings, "available_node_types": types, "head_node_type": "ray.head.default"}


@pytest.mark.alone
def test_rays_autoscaler_starts_the_machines(tmp_path):
    if reason := hosts.missing():
        pytest.skip(f"Ray's fake machines can only be ended with a process namespace ({reason})")
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
