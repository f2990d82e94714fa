"""Training workers as plain processes with gloo, without Ray: a run takes seconds instead of half a minute.

The fixture `worker_processes` (tests/conftest.py) has training runs use it. What Ray itself does for a run, its
placement, its pipelines and the loss of its nodes, is tested with Ray.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
from trainers import read_in_process

from raybge.cluster.resources import Cluster, Plan
from raybge.training.health.run_state import RunState, RunStateLostError, RunStateStore
from raybge.training.worker_config import WorkerConfig

CPUS = 6
# Modules that each worker would import: the server, from which workers are forked, imports them once.
PRELOADED = [
    "raybge.training.worker",
    "raybge.training.tasks.finetune_task",
    "raybge.training.tasks.pretrain_task",
    "raybge.losses.contrastive_model",
    "raybge.losses.retromae_loading",
    "raybge.evaluation.in_training",
    "raybge.model.card",
    "raybge.model.lora",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
    "torch._dynamo",
    "trainers",
    "process_runtime",
    "pytest",
    "ray",
]
GRACE_SECONDS = 1.0  # after the first failure of a worker, for those of the others to arrive


def preload() -> Any:
    """Return multiprocessing's context "forkserver", whose processes have imported PRELOADED."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_in_processes(function: Callable, arguments: tuple, count: int) -> None:
    """Call function(rank, *arguments) in `count` processes; raise the first error."""
    import torch.multiprocessing

    preload()
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


@contextmanager
def use_processes() -> Iterator[None]:
    """Have training runs use `ProcessRuntime`."""
    with mock.patch("raybge.training.run.RUNTIME", ProcessRuntime):
        yield


class WorkerFailuresError(Exception):
    """Exceptions of workers by rank, like the error of Ray Train."""

    def __init__(self, worker_failures: dict[int, BaseException]) -> None:
        super().__init__("; ".join(f"worker {rank}: {error!r}" for rank, error in worker_failures.items()))
        self.worker_failures = worker_failures


class WorkerDiedError(RuntimeError):
    """A worker's process has ended without a result."""


class ProcessRuntime:
    """Implementation of `Runtime` on one machine of CPUS cores. `runs` counts the calls of `run_workers`."""

    runs = 0

    @contextmanager
    def connect(self, scale: Any, console: Any) -> Iterator[Cluster]:
        yield Cluster(True, CPUS, 0, 1, (CPUS,), (0,))

    def create_run_state(self) -> RunState:
        return RunState(SocketServer())

    def run_workers(
        self, function: Callable, config: WorkerConfig, plan: Plan, process_group: dict[str, Any], folder: Path
    ) -> None:
        ProcessRuntime.runs += 1
        attempt = uuid.uuid4().hex
        folder = folder / attempt
        folder.mkdir(parents=True)
        job = cloudpickle.dumps((function, config, process_group, dict(os.environ)))
        context = preload()
        workers: dict[int, tuple[Any, Connection]] = {}
        for rank in range(plan.workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, plan.workers, str(folder), job, sender), daemon=True, name=f"worker {rank}"
            )
            process.start()
            sender.close()
            workers[rank] = process, receiver
        try:
            failures = _collect(workers)
        finally:
            for process, _ in workers.values():
                process.kill()
                process.join()
        if failures:
            for rank, error in failures.items():
                error.add_note((folder / f"worker-{rank}.log").read_text()[-2000:])
            raise WorkerFailuresError(failures)

    def release(self, output_dir: str) -> None:
        pass


def _collect(workers: dict[int, tuple[Any, Connection]]) -> dict[int, BaseException]:
    """Wait until all workers have ended, or one has failed; return the failures."""
    failures: dict[int, BaseException] = {}
    pending = {receiver: rank for rank, (_, receiver) in workers.items()}
    deadline: float | None = None
    while pending and (deadline is None or time.monotonic() < deadline):
        for receiver in wait(list(pending), None if deadline is None else max(0.0, deadline - time.monotonic())):
            rank = pending.pop(receiver)
            try:
                error = pickle.loads(receiver.recv_bytes())
            except EOFError:
                workers[rank][0].join()
                error = WorkerDiedError(f"exit code {workers[rank][0].exitcode}")
            if error is not None:
                failures[rank] = error
                deadline = deadline or time.monotonic() + GRACE_SECONDS
    return failures


def _work(rank: int, world: int, folder: str, job: bytes, sender: Connection) -> None:
    """Run in each worker's process; send its exception, None if it succeeds."""
    log = os.open(f"{folder}/worker-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)  # like a worker of Ray, whose folder is not that of the driver
    error: BaseException | None = None
    try:
        function, config, process_group, environment = cloudpickle.loads(job)
        os.environ.clear()
        os.environ.update(environment)
        _join(rank, world, folder, process_group)
        function({"worker": config, "context": partial(ProcessWorkerContext, rank, world, Path(folder).name)})
    except BaseException as raised:
        traceback.print_exc()
        error = raised
    sender.send_bytes(_dumps(error))
    sender.close()
    os._exit(0)  # the threads of gloo may still wait for other workers


def _dumps(error: BaseException | None) -> bytes:
    try:
        data = cloudpickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return cloudpickle.dumps(RuntimeError(repr(error)))
    return data


def _join(rank: int, world: int, folder: str, process_group: dict[str, Any]) -> None:
    """Join the process group, with the environment variables that accelerate reads."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "NODE_RANK": "0", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # never connected to: the store is a file
    store = dist.FileStore(f"{folder}/store", world)
    limit = timedelta(seconds=process_group["timeout_s"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


class ProcessWorkerContext:
    """Implementation of `WorkerContext`."""

    address = "127.0.0.1"

    def __init__(self, rank: int, world: int, attempt: str) -> None:
        self.rank, self.world, self.attempt = rank, world, attempt
        self.handle = ProcessHandle(os.getpid())

    def record_resources(self, output_dir: str) -> None:
        pass

    def read_steps(self, stream: Any) -> Iterator[Any]:
        return read_in_process(stream)

    def report_checkpoint(self, path: str) -> None:
        pass


class ProcessHandle:
    """Implementation of `WorkerHandle`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class SocketServer:
    """Implementation of `StateServer`: the state is in the driver, workers reach it through a Unix socket."""

    def __init__(self) -> None:
        self._store, self._lock = RunStateStore(), threading.Lock()
        self._key = os.urandom(16)
        listener = Listener(family="AF_UNIX", backlog=16, authkey=self._key)
        self._address = listener.address
        threading.Thread(target=self._accept, args=(listener,), daemon=True, name="run state").start()

    def __reduce__(self) -> tuple[Any, ...]:
        return SocketClient, (self._address, self._key)

    def send(self, method: str, *values: Any, **named: Any) -> None:
        self.call(method, *values, **named)

    def call(self, method: str, *values: Any, **named: Any) -> Any:
        with self._lock:
            result = getattr(self._store, method)(*values, **named)
            return pickle.loads(pickle.dumps(result))  # like the result of an actor: a copy

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = listener.accept()
            except (OSError, EOFError, multiprocessing.AuthenticationError):
                continue  # a worker was killed while it connected
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="run state").start()

    def _serve(self, connection: Connection) -> None:
        try:
            while True:
                method, values, named, replies = connection.recv()
                result = self.call(method, *values, **named)
                if replies:
                    connection.send(result)
        except (OSError, EOFError):
            return  # the worker has ended


class SocketClient:
    """A worker's connection to the `SocketServer`; made where it is unpickled."""

    def __init__(self, address: Any, key: bytes) -> None:
        self._connection, self._lock = Client(address, authkey=key), threading.Lock()

    def send(self, method: str, *values: Any, **named: Any) -> None:
        self._exchange((method, values, named, False))

    def call(self, method: str, *values: Any, **named: Any) -> Any:
        return self._exchange((method, values, named, True))

    def _exchange(self, message: tuple[Any, ...]) -> Any:
        try:
            with self._lock:
                self._connection.send(message)
                return self._connection.recv() if message[-1] else None
        except (OSError, EOFError) as error:
            raise RunStateLostError(str(error)) from error
