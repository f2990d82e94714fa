"""Network interfaces of the training workers' process group.

By default gloo listens at the address that the host's own name resolves to. On many systems that is a loopback address,
which no other machine can reach. So each worker sets the interface with the address by which Ray's nodes reach each
other. If all workers are on one machine, whose address in Ray is a loopback address, no other machine may connect:
torch's store, through which workers connect without a password, would otherwise listen at all addresses.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore

from raybge.compat.ray import torch_backend
from raybge.compat.torch import replace_rendezvous_store

INTERFACE = "GLOO_SOCKET_IFNAME"

_TorchBackend: Any = torch_backend()


class NodeTorchConfig(TorchConfig):
    """Ray Train's TorchConfig for workers that other nodes can reach."""

    @property
    def backend_cls(self) -> type[NodeTorchBackend]:
        """Backend class that Ray Train instantiates."""
        return NodeTorchBackend


class NodeTorchBackend(_TorchBackend):
    """Starts the process group as Ray Train does, after each worker has set its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set the workers' interfaces, then start the process group."""
        worker_group.execute(choose_interface)
        worker_group.execute(restrict_to_loopback)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Have gloo use the interface with this node's address in Ray, unless the environment names one."""
    import ray

    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if node_address in (each.address for each in addresses):
            os.environ.setdefault(INTERFACE, name)
            return


def restrict_to_loopback() -> None:
    """Have torch's store listen at this node's address in Ray only, if that is a loopback address."""
    import ray

    if ray.util.get_node_ip_address().startswith("127."):
        replace_rendezvous_store(loopback_store)


def loopback_store(host_name: str, port: int, world_size: int, is_master: bool, **options: Any) -> TCPStore:
    """Create torch's TCPStore with a server that listens at `host_name` instead of at all addresses.

    Args:
        host_name: address of the server.
        port: port of the server.
        world_size: number of workers.
        is_master: this process runs the server.
        **options: other arguments of TCPStore.

    Returns:
        The store, connected.
    """
    if is_master:
        # the store owns and closes the socket
        options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
    return TCPStore(host_name, port, world_size, is_master, **options)
