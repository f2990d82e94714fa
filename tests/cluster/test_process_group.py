"""Interface that gloo listens on; tests/multi_node shows that machines reach each other by it."""

import os

import psutil
import pytest
import ray

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
