"""Process group of the workers; tests/multi_node shows that machines reach each other by it."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import ray.train.torch
import torch
from process_runtime import run_in_processes

from raybge.cluster import process_group as network


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restore the variable after the test."""
    monkeypatch.setenv(network.INTERFACE, "")
    monkeypatch.delenv(network.INTERFACE)


def known_as(monkeypatch, address: str) -> str | None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    network.choose_interface()
    return os.environ.get(network.INTERFACE)


def test_the_interface_has_the_nodes_address(monkeypatch):
    for name, addresses in psutil.net_if_addrs().items():
        monkeypatch.delenv(network.INTERFACE, raising=False)
        assert known_as(monkeypatch, addresses[0].address) == name


def test_the_environment_takes_precedence(monkeypatch):
    monkeypatch.setenv(network.INTERFACE, "ib0")
    assert known_as(monkeypatch, "127.0.0.1") == "ib0"


def test_without_a_matching_interface_gloo_chooses(monkeypatch):
    """For example behind address translation."""
    assert known_as(monkeypatch, "203.0.113.1") is None


def listening_addresses(port: int) -> set[str]:
    """Addresses at which this process listens at a port."""
    connections = psutil.Process().net_connections("inet")
    return {each.laddr.ip for each in connections if each.laddr.port == port and not each.raddr}


@pytest.mark.parametrize("own", ["127.0.0.1", "::1"])
def test_the_store_listens_at_the_nodes_address_only(monkeypatch, own):
    if own not in (each.address for each in psutil.net_if_addrs()["lo"]):
        pytest.skip(f"this machine has no address {own}")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: own)
    monkeypatch.setattr(network, "_store", None)
    address, port = network.host_store()
    assert address == own and listening_addresses(port) == {own}


def test_the_store_listens_at_all_addresses_behind_address_translation(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.1")
    monkeypatch.setattr(network, "_store", None)
    address, port = network.host_store()
    assert address == "203.0.113.1" and listening_addresses(port) & {"0.0.0.0", "::"}


def join_and_sum(rank: int, folder: str) -> None:
    """Join as worker `rank` of two, without Ray Train; write the sum of the ranks and the environment."""
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    ranks = SimpleNamespace(get_node_rank=lambda: 0, get_local_rank=lambda: rank, get_local_world_size=lambda: 2)
    ray.train.get_context, ray.train.torch.get_device = lambda: ranks, lambda: "cpu"
    meeting = Path(folder, "meeting")
    if rank == 0:
        meeting.with_suffix(".part").write_text(json.dumps(network.host_store()))
        meeting.with_suffix(".part").rename(meeting)
    while not meeting.exists():
        time.sleep(0.05)
    network.join(*json.loads(meeting.read_text()), rank, 2, "gloo", 60)
    total = torch.tensor(rank + 1.0)
    torch.distributed.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
    Path(folder, str(rank)).write_text(json.dumps([float(total), [os.environ[name] for name in names]]))
    network.leave()
    assert not torch.distributed.is_initialized()


def test_workers_join_by_the_store_of_the_first(tmp_path):
    run_in_processes(join_and_sum, (str(tmp_path),), 2)
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert results == [[3.0, [str(rank), "2", str(rank), "2", "0", "127.0.0.1"]] for rank in range(2)]
