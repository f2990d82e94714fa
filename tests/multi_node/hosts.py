"""Three simulated hosts on one machine, connected only by a network and a shared folder.

Each host has its own network, host name, processes, `/tmp/ray` and home folder, and an sshd. A bridge connects them to
the «outside», from which the cluster is controlled. All of it is in namespaces below one process, and ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
SPACES = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
PATH = f"{os.path.dirname(sys.executable)}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ADDRESSES = ("10.77.0.2", "10.77.0.3", "10.77.0.4")

# Private resources of each host, and of the outside (0), set up within their namespaces. $1: number.
PRIVATE = """
set -eu
hostname host$1
for place in home own; do mount --bind $place$1 $place; done
mkdir -p /tmp/ray && mount --bind ray$1 /tmp/ray
mount --bind passwd /etc/passwd
mount --bind shadow /etc/shadow
ip link set lo up
"""

# A host: wait for its end of the cable, then run sshd.
HOST = """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add 10.77.0.$(($1 + 1))/24 dev eth0
ip link set eth0 up
ip route add default via 10.77.0.1
mount -t tmpfs tmpfs /run && mkdir /run/sshd
exec /usr/sbin/sshd -D -e -f sshd_config
"""

# The outside: a bridge, and a cable from it to each host.
OUTSIDE = """
ip link add bridge type bridge
ip addr add 10.77.0.1/24 dev bridge
ip link set bridge up
for i in 1 2 3; do
    unshare SPACES sh host.sh $i 2>sshd$i.log &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link add cable$i type veth peer name eth0 netns $!
    ip link set cable$i master bridge up
done
touch ready
sleep infinity
"""

SSHD = """
HostKey {base}/host_key
AuthorizedKeysFile {base}/key.pub
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""


def missing() -> str | None:
    """Return the reason why this machine permits no simulated hosts; None if it does."""
    path = f"{PATH}:{os.environ.get('PATH', '')}"
    if lacking := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"not installed: {', '.join(lacking)}"
    needed = "ip link add bridge type bridge && ip link add cable type veth peer name end && mount --bind /tmp /tmp"
    probe = subprocess.run(["unshare", *SPACES, "sh", "-c", needed], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"namespaces are not permitted: {probe.stderr.strip()}"


def run_alone(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script on a host without network; stdout and stderr together.

    Its `/tmp/ray` is in `folder`. `more` is added to this process's environment. Processes that the script leaves
    running end with it.
    """
    (folder / "ray").mkdir()
    own = f"set -e; mkdir -p /tmp/ray; mount --bind {folder}/ray /tmp/ray; ip link set lo up\n"
    return subprocess.run(
        ["unshare", *SPACES, "sh", "-c", own + script],
        env={**os.environ, "PATH": PATH, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Hosts:
    """Context manager that runs the hosts.

    Attributes:
        shared: folder that all hosts share.
        own: private folder of each host, at the same path on all of them.
        home: home folder of each host, at the same path on all of them.
        homes: paths of the hosts' home folders on this machine.
    """

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="raybge-hosts-"))
        self.homes = [self.base / f"home{i}" for i in range(1, len(ADDRESSES) + 1)]
        self.shared, self.own, self.home = (self.base / name for name in ("shared", "own", "home"))
        self.key = self.base / "key"

    def __enter__(self) -> Hosts:
        try:
            self._create_files()
            command = ["unshare", *SPACES, "sh", "outside.sh", "0"]
            with open(self.base / "outside.log", "w") as log:
                self._outside = subprocess.Popen(command, cwd=self.base, stdout=log, stderr=log)
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_outside"):
            self._outside.kill()
            self._outside.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of commands outside the hosts."""
        return {"PATH": PATH, "HOME": str(self.home), "LANG": "C.UTF-8", "RAY_USAGE_STATS_ENABLED": "0", **more}

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on the outside, connected to the hosts' bridge."""
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children").read_text().split()
        return ["nsenter", "--target", children[0], "--net", "--uts", "--mount", "--pid", "--wd=.", "--", *command]

    def run(self, *command: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside the hosts; stdout and stderr together."""
        return subprocess.run(
            self.inside(command),
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command outside the hosts, in a process group of its own."""
        with open(self.base / f"{command[1]}.log", "w") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(self.inside(command), env=self.environment(), start_new_session=True, **streams)

    def ssh(self, address: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return self.run("ssh", "-i", str(self.key), *options, f"root@{address}", command)

    def processes(self, address: str) -> list[str]:
        """Return the commands of the processes on a host, without sshd and those of this query."""
        args = self.ssh(address, "ps -eo args=").stdout.splitlines()
        return [line for line in args if not line.startswith(("sshd:", "/usr/sbin/sshd", "ps -eo", "bash -c ps"))]

    def _create_files(self) -> None:
        for name in ("shared", "own", "home"):
            (self.base / name).mkdir()
        for i in range(len(ADDRESSES) + 1):
            for name in ("own", "home", "ray"):
                (self.base / f"{name}{i}").mkdir()
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.base / name], check=True)
        (self.base / "sshd_config").write_text(SSHD.format(base=self.base))
        users = f"root:x:0:0:root:{self.home}:/bin/bash", "sshd:x:101:65534::/run/sshd:/bin/false"
        (self.base / "passwd").write_text("\n".join([*users, ""]))
        (self.base / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (self.base / "host.sh").write_text(PRIVATE + HOST)
        (self.base / "outside.sh").write_text(PRIVATE + OUTSIDE.replace("SPACES", " ".join(SPACES)))

    def _wait_until_up(self) -> None:
        end = time.monotonic() + 60
        for address in ADDRESSES:
            while not (self.base / "ready").exists() or self.ssh(address, "true").returncode:
                log = (self.base / "outside.log").read_text()
                assert self._outside.poll() is None and time.monotonic() < end, f"{address} does not come up: {log}"
                time.sleep(0.2)
