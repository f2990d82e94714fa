"""Cluster files: accepted by Ray, with pinned versions and the token on every node."""

import json
import re
from pathlib import Path

import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "jobs/cluster.local.yaml")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def locked(package: str) -> str:
    """Return the version of a package in the lock file."""
    versions = re.findall(rf"^{package}==(\S+)$", (ROOT / "requirements/lock-gpu.txt").read_text(), re.MULTILINE)
    assert len(versions) == 1
    return versions[0]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name):
    """As `ray up` does: the provider's defaults are filled in, then the file is validated against Ray's schema."""
    validate_config(prepare_config(read(name)))
    known = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())["properties"]
    assert set(read(name)) <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_every_node_gets_the_pinned_ray_and_the_token(name):
    config = read(name)
    pinned = dict(re.findall(r"'([\w\[\]]+)==([\d.]+)'", " ".join(config["setup_commands"])))
    assert pinned == {"ray[default]": locked("ray"), "virtualenv": locked("virtualenv")}
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][-1]
    for kind in ("head", "worker"):
        assert "--object-spilling-directory=" in config[f"{kind}_start_ray_commands"][-1]


def test_both_files_start_nodes_alike():
    cloud, local = map(read, FILES)
    assert all(cloud[name] == local[name] for name in ("file_mounts", "setup_commands"))
    for kind in ("head", "worker"):
        start = cloud[f"{kind}_start_ray_commands"][-1].removeprefix("ulimit -n 65536; ")
        assert start in local[f"{kind}_start_ray_commands"][-1]


def test_cloud_cluster_grows_from_zero_on_spot_machines():
    config = read("cluster.yaml")
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for node in types.values():
        assert node["min_workers"] == 0
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(node["max_workers"] for node in types.values()) <= config["max_workers"]


def test_jobs_install_the_locked_packages():
    from ray.runtime_env import RuntimeEnv

    environment = read("jobs/runtime_env.yaml")
    assert (ROOT / environment["pip"]).is_file()
    # The path is relative to the folder in which `ray job submit` runs.
    packages = RuntimeEnv(**{**environment, "pip": str(ROOT / environment["pip"])}).pip_config()["packages"]
    assert f"ray=={locked('ray')}" in packages and f"torch=={locked('torch')}" in packages
