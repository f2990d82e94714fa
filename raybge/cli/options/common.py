"""What flags of several commands share: their groups in the help, how a model is found, where a run runs."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.parser import flag

SEARCH, MODEL, LORA, DATA, LOSS, VALIDATION, MINING, TEACHER, METRICS, VECTORS, RUN, SCALE = (
    "search",
    "model",
    "low-rank adaptation",
    "data",
    "objective",
    "evaluation while training",
    "mining",
    "cross-encoder",
    "evaluation",
    "vectors",
    "run",
    "workers and cluster",
)
POOLING = ("cls", "mean", "last_token")


@dataclass(kw_only=True)
class CommonOptions:
    """What every command that runs on Ray accepts."""

    num_workers: str | None = flag(None, SCALE, "workers; left out, the cluster decides", metavar="N")
    use_gpu: bool | None = flag(None, SCALE, "give each worker a GPU; left out, when the cluster has any")
    cpus_per_worker: int | None = flag(None, SCALE, "CPU cores, and threads, of each worker")
    storage_path: str | None = flag(None, SCALE, "shared folder or URI for what a run keeps between its processes")
    max_failures: int = flag(0, SCALE, "restarts after a lost worker (-1: no limit)", unbuilt=True)
    address: str | None = flag(
        None, SCALE, "Ray cluster to join; left out: RAY_ADDRESS, a live `ray start`, or this machine"
    )
    on_bad_rows: str = flag("stop", DATA, "what to do with rows that cannot be used", choices=("stop", "skip"))
    config: str | None = flag(None, RUN, "YAML file of flags; those on the command line override it")
    dry_run: bool = flag(False, RUN, "print the plan and stop")
    verbose: bool = flag(False, RUN, "leave the messages of Ray and transformers on the console")


@dataclass(kw_only=True)
class ModelOptions:
    """How a model is found and opened."""

    cache_dir: str | None = flag(None, MODEL, "where models from the hub are kept")
    trust_remote_code: bool = flag(False, MODEL, "let the model's folder bring its own code")
