"""The network over which training workers talk.

Without being told, gloo listens at the address that the host's own name stands for. On many systems that is a loopback
address, which no other machine can reach. So each worker names the interface that has the address by which Ray's nodes
know each other.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeTorchConfig(TorchConfig):
    """Ray Train's TorchConfig, with workers that are reachable from other nodes."""

    @property
    def backend_cls(self) -> type[NodeTorchBackend]:
        return NodeTorchBackend


class NodeTorchBackend(_TorchBackend):
    """Starts the process group as Ray Train does, after each worker chose its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Have gloo use the interface with this node's address in Ray, unless the environment names one."""
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (found.address for found in addresses):
            os.environ.setdefault(INTERFACE, name)
            return
