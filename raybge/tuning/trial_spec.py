"""TrialSpec: configuration that all trials of a search share; each trial adds its hyperparameters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.cli.options import TrainOptions
from raybge.cli.parser import declared_flags
from raybge.tuning.search_space import MINING_PREFIX
from raybge.util.digest import fingerprint

if TYPE_CHECKING:
    from raybge.cluster.resources import Plan
    from raybge.tuning.held_out_split import HeldOutSplit
    from raybge.tuning.spec import TuningSpec

EVALUATIONS = 8  # evaluations of a trial if --eval_steps is unset
PBT_INTERVAL = 25  # percent of a run after which population based training may replace a trial
# Hyperparameters on which neither the batches nor the evaluation before training depend: trials that differ only in
# these share tokens and that evaluation.
OPTIMIZER_FLAGS = {
    *("learning_rate", "temperature", "weight_decay", "max_grad_norm", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "warmup_ratio", "warmup_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "use_inbatch_neg", "negatives_cross_device", "kd_loss_type"),
    *("teacher_temperature", "contrastive_weight", "score_bands", "directions", "partition_mode", "bidirectional"),
    *("hardness_mode", "hardness_strength", "hardness_normalize"),
}
_TRAINING_PATHS = (
    *("model_name_or_path", "config_name", "tokenizer_name", "cache_dir"),
    *("guide_model", "deepspeed", "batch_vectors"),
)
_WRITTEN_PATHS = ("logging_dir", "cache_path")
_MINING_PATHS = ("model_name_or_path", "cross_encoder", "cache_dir")


@dataclass(frozen=True)
class TrialSpec:
    """Configuration that all trials of a search share.

    Args:
        flags: flags of the training run, except for the hyperparameters and the output folder.
        folder: folder with one subfolder per trial, shared by all nodes.
        runs: trials at a time.
        shared: folder of data that trials share.
        mining: flags of raybge.mine if each trial mines its negatives first.
        pauses: trials may pause and continue from a checkpoint.
    """

    flags: Mapping[str, Any] = field(repr=False)  # with the token
    folder: str
    runs: int
    shared: str
    mining: Mapping[str, Any] | None = None
    pauses: bool = False

    def trial_folder(self, trial_id: str) -> Path:
        """Return a trial's folder."""
        return Path(self.folder) / trial_id

    def shared_folder(self, hyperparameters: Mapping[str, Any]) -> Path:
        """Return the folder that a trial shares with others for tokens and the evaluation before training."""
        key = {name: value for name, value in hyperparameters.items() if name not in OPTIMIZER_FLAGS}
        return Path(self.shared) / fingerprint(key)

    def stage_flags(
        self, hyperparameters: Mapping[str, Any], mined_file: str, output_dir: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return a trial's flags for each command.

        Args:
            hyperparameters: sampled value of each searched flag.
            mined_file: output of mining, which is trained on.
            output_dir: output folder of training.

        Returns:
            Flags of raybge.mine, None if the trial mines nothing, and flags of raybge.train.
        """
        train_flags = declared_flags(TrainOptions)
        training = {**self.flags, **{name: value for name, value in hyperparameters.items() if name in train_flags}}
        training["output_dir"] = output_dir
        if self.mining is None:
            return None, training
        mining = dict(self.mining)
        for name, value in hyperparameters.items():
            if name not in train_flags:
                mining[name.removeprefix(MINING_PREFIX)] = value
        mining |= {"input_file": training["train_data"], "output_file": mined_file}
        return mining, {**training, "train_data": [mined_file]}


def trial_flags(spec: TuningSpec, plan: Plan, split: HeldOutSplit | None) -> dict[str, Any]:
    """Return the flags of a trial's training run except for the hyperparameters and the output folder.

    Paths are absolute, since a trial's current folder is Ray's.

    Args:
        spec: the search.
        plan: workers of each trial.
        split: held-out groups; None if the search has evaluation data.

    Returns:
        Flags of raybge.train by name.
    """
    pbt = spec.search.scheduler == "pbt"
    flags: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": PBT_INTERVAL / 100 if pbt else 1 / EVALUATIONS,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags |= {name: value for name, value in spec.training_flags.items() if value is not None}
    flags |= {"num_workers": str(plan.workers), "cpus_per_worker": plan.cpus, "use_gpu": bool(plan.gpus)}
    if spec.search.pauses_trials:  # a trial may continue from any evaluation
        flags |= {"save_strategy": flags["eval_strategy"], "save_steps": flags["eval_steps"]}
    if split is None:
        flags |= {name: [*map(absolute_path, flags[name])] for name in ("eval_data", "eval_corpus") if name in flags}
        flags["train_data"] = [*map(absolute_path, spec.train_data)]
    else:
        flags |= {"train_data": [split.train], "eval_data": [split.dev], "eval_corpus": [split.corpus]}
    flags |= {name: os.path.abspath(flags[name]) for name in _WRITTEN_PATHS if name in flags}
    return flags | _absolute(flags, _TRAINING_PATHS)


def mining_flags(spec: TuningSpec, flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flags with which each trial mines, None if trials mine nothing.

    Args:
        spec: the search.
        flags: see `trial_flags`; mining runs on the workers of training.

    Returns:
        Flags of raybge.mine by name, with a storage for vectors that all trials share.
    """
    if spec.mining is None:
        return None
    scale = {name: flags[name] for name in ("num_workers", "cpus_per_worker", "use_gpu")}
    mining = {**scale, **spec.mining, "storage_path": str(spec.work)}
    if "corpus_data" in mining:
        pool = mining["corpus_data"]
        mining["corpus_data"] = [*map(absolute_path, pool if isinstance(pool, list) else [pool])]
    return mining | _absolute(mining, _MINING_PATHS)


def absolute_path(path: str) -> str:
    """Return a path that is valid in any current folder; URIs and hub names unchanged."""
    is_local = "://" not in path and (os.path.exists(path) or any(each in path for each in "*?["))
    return os.path.abspath(path) if is_local else path


def _absolute(flags: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    return {name: absolute_path(flags[name]) for name in names if isinstance(flags.get(name), str)}
