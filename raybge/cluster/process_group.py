"""The network over which training workers talk.

Without being told, gloo listens at the address that the host's own name stands for. On many systems that is a loopback
address, which no other machine can reach. So each worker names the interface that has the address by which Ray's nodes
know each other. Where all workers are on one machine, which Ray knows by its loopback address, nobody else is listened
to: torch's store, through which workers find each other and which asks for no password, would listen everywhere.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore
from torch.distributed.rendezvous import _create_c10d_store

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
        worker_group.execute(stay_on_this_machine)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Have gloo use the interface with this node's address in Ray, unless the environment names one."""
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (found.address for found in addresses):
            os.environ.setdefault(INTERFACE, name)
            return


def stay_on_this_machine() -> None:
    """Have torch's store listen at this node's address in Ray alone where that is a loopback address."""
    import ray

    if ray.util.get_node_ip_address().startswith("127."):
        # torch.distributed.rendezvous, as an attribute, is a function of that name
        sys.modules[_create_c10d_store.__module__].TCPStore = loopback_store  # type: ignore[attr-defined]


def loopback_store(host_name: str, port: int, world_size: int, is_master: bool, **more: Any) -> TCPStore:
    """torch's TCPStore, whose server listens at `host_name` instead of at all addresses."""
    if is_master:
        more["master_listen_fd"] = socket.create_server((host_name, port)).detach()  # the store's own from here on
    return TCPStore(host_name, port, world_size, is_master, **more)
