"""The cluster files: what Ray accepts, and the versions and the lock that every node gets."""

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
    found = re.findall(rf"^{package}==(\S+)$", (ROOT / "requirements/lock-gpu.txt").read_text(), re.MULTILINE)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name):
    """As `ray up` reads it: filled with the provider's defaults, then held against Ray's schema."""
    validate_config(prepare_config(read(name)))
    known = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())["properties"]
    assert set(read(name)) <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_every_node_gets_the_projects_ray_and_the_token(name):
    config = read(name)
    pinned = dict(re.findall(r"'([\w\[\]]+)==([\d.]+)'", " ".join(config["setup_commands"])))
    assert pinned == {"ray[default]": locked("ray"), "virtualenv": locked("virtualenv")}
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][-1]
    for kind in ("head", "worker"):
        assert "--object-spilling-directory=" in config[f"{kind}_start_ray_commands"][-1]


def test_the_two_files_start_nodes_alike():
    cloud, local = map(read, FILES)
    assert all(cloud[name] == local[name] for name in ("file_mounts", "setup_commands"))
    for kind in ("head", "worker"):
        start = cloud[f"{kind}_start_ray_commands"][-1].removeprefix("ulimit -n 65536; ")
        assert start in local[f"{kind}_start_ray_commands"][-1]


def test_the_cloud_grows_from_nothing_on_spot_machines():
    config = read("cluster.yaml")
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for node in types.values():
        assert node["min_workers"] == 0
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(node["max_workers"] for node in types.values()) <= config["max_workers"]


def test_jobs_bring_the_locked_packages():
    from ray.runtime_env import RuntimeEnv

    given = read("jobs/runtime_env.yaml")
    assert (ROOT / given["pip"]).is_file()
    # the path counts from where `ray job submit` runs
    packages = RuntimeEnv(**{**given, "pip": str(ROOT / given["pip"])}).pip_config()["packages"]
    assert f"ray=={locked('ray')}" in packages and f"torch=={locked('torch')}" in packages
