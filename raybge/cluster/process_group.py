"""Process group of the training workers: a Ray Train backend that chooses where the workers listen.

Torch's TCPStore, through which workers find each other without a password, listens at all addresses of a machine unless
it gets a socket. And gloo listens at the address that the host's own name resolves to, on many systems a loopback
address, which no other machine can reach. Here both listen at the address by which Ray's nodes know each other: on a
single machine, which Ray knows by its loopback address, no other machine can connect.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore

INTERFACE = "GLOO_SOCKET_IFNAME"
# A worker that waits at the end of a run for a failed one to leave the process group never leaves: a longer time would
# only delay the error message.
SHUTDOWN_SECONDS = 3

_store: TCPStore | None = None  # server in worker 0's process


class NodeTorchConfig(TorchConfig):
    """Ray Train's TorchConfig with the backend `NodeTorchBackend`."""

    @property
    def backend_cls(self) -> type[NodeTorchBackend]:
        """Backend class that Ray Train instantiates."""
        return NodeTorchBackend


class NodeTorchBackend(Backend):
    """Starts and ends the process group of the workers."""

    share_cuda_visible_devices = True  # of all workers of a node, as NCCL requires

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Start a store in worker 0, then have all workers join the process group."""
        address, port = worker_group.execute_single(0, host_store)
        size = len(worker_group)
        joins = [
            worker_group.execute_single_async(
                rank, join, address, port, rank, size, backend_config.backend, backend_config.timeout_s
            )
            for rank in range(size)
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Have the workers leave the process group; wait for SHUTDOWN_SECONDS at most."""
        exits = worker_group.execute_async(leave)
        ray.wait(exits, num_returns=len(exits), timeout=SHUTDOWN_SECONDS)


def choose_interface() -> None:
    """Have gloo use the interface with this node's address in Ray, unless the environment names one."""
    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if node_address in (each.address for each in addresses):
            os.environ.setdefault(INTERFACE, name)
            return


def host_store() -> tuple[str, int]:
    """Start a TCPStore's server at this node's address in Ray.

    Behind address translation no interface has that address: the server then listens at all of them.

    Returns:
        Address and port.
    """
    global _store
    address = listen_address = ray.util.get_node_ip_address()
    try:
        listener = _listener(address)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        print(f"no interface has this node's address {address}: the store listens at all addresses", file=sys.stderr)
        listen_address, listener = "127.0.0.1", _listener("")
    port = listener.getsockname()[1]
    # The store owns and closes the socket.
    fd = listener.detach()
    _store = TCPStore(listen_address, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    return address, port


def _listener(address: str) -> socket.socket:
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def join(address: str, port: int, rank: int, size: int, backend: str, timeout_seconds: float) -> None:
    """Join the process group, with the environment variables that accelerate and DeepSpeed read.

    Args:
        address: address of the store.
        port: its port.
        rank: rank of this worker.
        size: number of workers.
        backend: torch's name of the backend.
        timeout_seconds: time limit of a collective.
    """
    global _store
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "NODE_RANK": str(context.get_node_rank()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "ACCELERATE_TORCH_DEVICE": str(ray.train.torch.get_device()),
    }
    if not {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT"} & {*os.environ}:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"  # a collective whose time is over ends the worker
    choose_interface()
    limit = timedelta(seconds=timeout_seconds)
    store = _store if rank == 0 and _store else TCPStore(address, port, is_master=False)
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


def leave() -> None:
    """Leave the process group."""
    global _store
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    _store = None
