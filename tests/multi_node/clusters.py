"""Ray clusters of three nodes that accept jobs: on three simulated hosts or, if not possible, on this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from hosts import ADDRESSES, Hosts

ROOT = Path(__file__).parents[2]
BIN = os.path.dirname(sys.executable)
# of each node: one machine can run three of them
CPUS, OBJECT_STORE = 3, 150_000_000
UP_SECONDS = 180


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    Args:
        submit_code: exit code of `ray job submit`.
        exit_code: exit code of the job's program; None if it did not run.
        output: everything that was printed.
    """

    submit_code: int
    exit_code: int | None
    output: str


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def submit(run: Run, folder: Path, *command: object) -> Job:
    """Submit `python COMMAND ...` with the repository as its working directory, and wait for its end.

    The packages of jobs/runtime_env.yaml are not installed: they are present, and a test has no package index.
    """
    settings = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())
    del settings["pip"]
    environment = folder / "runtime_env.yaml"
    environment.write_text(yaml.safe_dump(settings))
    options = ["--working-dir", str(ROOT), "--runtime-env", str(environment)]
    done = run("ray", "job", "submit", *options, "--", "python", *map(str, command))
    failed = re.search(r"failed with exit code (\d+)", done.stdout)
    code = int(failed[1]) if failed else None
    return Job(done.returncode, 0 if done.returncode == 0 else code, done.stdout)


class ClusterOnHosts:
    """Cluster from `ray up jobs/cluster.local.yaml` on three hosts; jobs are submitted through `ray dashboard`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.shared = hosts, hosts.shared
        self.config = hosts.base / "cluster.yaml"

    def up(self) -> None:
        """Start the cluster with the hosts' addresses and key, and small nodes. Ray is already installed."""
        config = yaml.safe_load((ROOT / "jobs/cluster.local.yaml").read_text())
        config["provider"].update(head_ip=ADDRESSES[0], worker_ips=list(ADDRESSES[1:]))
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        small = f"ray start --num-cpus={CPUS} --object-store-memory={OBJECT_STORE}"
        for kind in ("head", "worker"):
            commands = config[f"{kind}_start_ray_commands"]
            commands[-1] = commands[-1].replace("ray start", small)
        self.config.write_text(yaml.safe_dump(config))
        for home in self.hosts.homes:
            (home / "raybge").symlink_to(sys.prefix)
            # Without processes started in advance: each job would begin with nine of them.
            (home / ".bashrc").write_text("export RAY_USAGE_STATS_ENABLED=0 RAY_prestart_worker_first_driver=0\n")
        self._run("ray", "get-auth-token", "--generate")
        self._run("ray", "up", "--yes", "--no-config-cache", str(self.config))
        self._dashboard = self.hosts.start("ray", "dashboard", "--no-config-cache", str(self.config))
        self._wait(lambda: f"/{CPUS * len(ADDRESSES)}.0 CPU" in self._status(), self._status)
        probe = ["bash", "-c", "</dev/tcp/localhost/8265"]
        self._wait(lambda: self.hosts.run(*probe).returncode == 0, lambda: "nothing answers at localhost:8265")

    def down(self) -> None:
        os.killpg(self._dashboard.pid, signal.SIGINT)
        self._run("ray", "down", "--yes", str(self.config))

    def submit(self, *command: object, mode: str = "token") -> Job:
        environment = {"RAY_AUTH_MODE": mode, "RAY_API_SERVER_ADDRESS": "http://localhost:8265"}
        return submit(lambda *words: self.hosts.run(*words, **environment), self.hosts.base, *command)

    def _status(self) -> str:
        return self.hosts.ssh(ADDRESSES[0], f"RAY_AUTH_MODE=token {BIN}/ray status").stdout

    def _run(self, *command: str) -> None:
        done = self.hosts.run(*command)
        assert done.returncode == 0, done.stdout

    def _wait(self, condition: Callable[[], bool], message: Callable[[], str]) -> None:
        end = time.monotonic() + UP_SECONDS
        while not condition():
            assert time.monotonic() < end, message()
            time.sleep(3)  # `ray status` takes CPU time from the starting nodes


class ClusterOnOneMachine:
    """Cluster from `ray.cluster_utils.Cluster`, whose nodes are processes of one host."""

    def __init__(self, folder: Path, nodes: int = len(ADDRESSES)) -> None:
        self.folder, self.shared, self.nodes = folder, folder, nodes

    def up(self) -> None:
        from ray.cluster_utils import Cluster

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self._dashboard = f"http://127.0.0.1:{port}"
        size = {"num_cpus": CPUS, "object_store_memory": OBJECT_STORE}
        os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"  # the nodes run jobs with the python of this environment
        self._cluster = Cluster(True, head_node_args={"include_dashboard": True, "dashboard_port": port, **size})
        for _ in range(1, self.nodes):
            self._cluster.add_node(**size)
        self._cluster.wait_for_nodes()

    def down(self) -> None:
        self._cluster.shutdown()

    def submit(self, *command: object) -> Job:
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_API_SERVER_ADDRESS": self._dashboard}

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            out = subprocess.PIPE
            return subprocess.run(words, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)

        return submit(run, self.folder, *command)
