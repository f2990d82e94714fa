"""Workers of Ray that are forked from one process, which has imported torch and transformers.

Ray starts a Python process for each actor, which then imports these libraries for 2 to 6 s of CPU. `fork_ray_workers`
has the raylets that this process starts use another "python" for workers: a script that asks the server of this module
to fork. The worker is Ray's own `default_worker.py` with the command line, environment and folder that the raylet gave
it. A worker whose environment has other values than the server's is started by python itself.
"""

import array
import atexit
import functools
import gc
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

# Ray itself is not among them: it reads the variables of a worker when it is imported.
PRELOADED = [
    "faiss",
    "pandas",
    "pyarrow.dataset",
    "raybge.encoding.run",
    "raybge.evaluation.in_training",
    "raybge.evaluation.run",
    "raybge.losses.contrastive_model",
    "raybge.mining.run",
    "raybge.model.card",
    "raybge.training.tasks.finetune_task",
    "raybge.training.tasks.pretrain_task",
    "raybge.training.worker",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
]
# Beginnings of the names of variables that the libraries above do not read when they are imported.
PER_WORKER = (
    "RAY_",
    "TUNE_",
    "PL_",
    "OMP_NUM_THREADS",
    "PYTHON",
    "PYTEST_",
    "SPT_NOENV",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "_",
)

# The script in place of python. It lives as long as the worker: the raylet may kill either.
LAUNCHER = """#!{python} -ISE
import array, json, os, socket, sys
context = dict(command_prefix=[], override_worker_entrypoint=None)
arguments, python = [], "{python}"
for argument in sys.argv[1:]:
    if argument.startswith("--serialized-runtime-env-context="):
        context.update(json.loads(argument.partition("=")[2] or "{{}}"))
    elif not argument.startswith("--language=") and not argument.endswith("/setup_worker.py"):
        arguments.append(argument)
is_plain = not context["command_prefix"] and not context["override_worker_entrypoint"]
is_plain = is_plain and context.get("py_executable", python) == python
if is_plain and arguments and arguments[0].endswith("/default_worker.py"):
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect("{address}")
        environment = dict(os.environ, **context.get("env_vars", {{}}))
        job = json.dumps([arguments, environment, os.getcwd()]).encode()
        descriptors = array.array("i", [0, 1, 2])
        connection.sendmsg([len(job).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        connection.sendall(job)
        if connection.recv(1):
            connection.recv(1)  # until the worker has ended
            sys.exit()
    except OSError:
        pass
os.execv(python, [python, *sys.argv[1:]])
"""


@contextmanager
def fork_ray_workers() -> Iterator[None]:
    """Have raylets that this process starts fork their workers."""
    from ray._private import services

    start = services.start_raylet

    @functools.wraps(start)
    def start_raylet(*args, **kwargs):
        # Only the worker's command takes the executable from here.
        stand_in = SimpleNamespace(**{**vars(sys), "executable": _launcher()})
        with mock.patch.object(services, "sys", stand_in):
            return start(*args, **kwargs)

    with mock.patch.object(services, "start_raylet", start_raylet):
        yield


@functools.cache
def _launcher() -> str:
    """Start the server, and return the path of the launcher."""
    folder = Path(tempfile.mkdtemp(prefix="workers-"))
    launcher = folder / "python"
    launcher.write_text(LAUNCHER.format(python=sys.executable, address=folder / "socket"))
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, folder / "socket", json.dumps(sys.path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return str(launcher)


# --- the server -------------------------------------------------------------------------------------------------------


def serve(address: str, path: list[str]) -> None:
    """Fork a worker for each connection, until the process that started the server has ended.

    Args:
        address: of the socket.
        path: `sys.path` to import the libraries with.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(128)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes workers that have ended
    expected = _shared(os.environ)
    base_path, sys.path[:] = sys.path[1:], path
    for module in PRELOADED:
        __import__(module)
    assert "ray" not in sys.modules
    gc.freeze()
    while listener in select.select([listener, sys.stdin], [], [])[0]:  # stdin ends with the process that holds it
        connection, _ = listener.accept()
        try:
            arguments, environment, folder, descriptors = _receive(connection)
        except (OSError, ValueError, IndexError) as error:  # it was killed before or while it sent its command line
            print(f"a launcher ended early: {error!r}", flush=True)
            connection.close()
            continue
        actual = _shared(environment)
        if actual != expected:
            names = {name for name in {*actual, *expected} if actual.get(name) != expected.get(name)}
            print(f"a worker with other variables is not forked: {sorted(names)}", flush=True)
        elif os.fork() == 0:
            listener.close()
            _work(connection, arguments, environment, folder, descriptors, base_path)
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _shared(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(PER_WORKER)}


def _receive(connection: socket.socket) -> tuple[list[str], dict[str, str], str, list[int]]:
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    with connection.makefile("rb") as stream:
        job = json.loads(stream.read(int.from_bytes(head, "big")))
    return *job, list(descriptors)


def _work(connection, arguments, environment, folder, descriptors, base_path) -> None:
    """Become the worker; never return."""
    status, log = 1, os.dup(2)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = [os.path.dirname(arguments[0]), *path, *base_path]
        sys.argv[:] = arguments
        random.seed()
        np.random.seed()
        connection.sendall(b"1")

        def end_with_launcher() -> None:
            connection.recv(1)
            os._exit(1)

        threading.Thread(target=end_with_launcher, daemon=True, name="launcher").start()
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        os.write(log, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
