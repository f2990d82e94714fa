"""Every flag of training has an effect: it changes the configuration of the workers, or has a test of its own."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.cluster.resources import Plan
from raybge.data.jsonl import Block, SourceFile
from raybge.data.order import Order
from raybge.data.survey import Survey
from raybge.training.spec import TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.worker_config import PlannedRun, TrialContext, WorkerConfig

VALUES = {
    "config": None,  # read by the parser
    "dry_run": None,  # test_train.py
    "verbose": None,  # read by the console
    "address": None,  # cluster/test_resources.py
    "num_workers": None,  # of the plan, cluster/test_resources.py
    "use_gpu": None,
    "cpus_per_worker": None,
    "on_bad_rows": None,  # test_train.py
    "accept_any_text": None,  # data/test_groups.py
    "overwrite_output_dir": None,  # test_train.py
    "small_threshold": None,  # these four: data/test_datasets.py and test_train.py
    "drop_threshold": None,
    "same_dataset_within_batch": None,
    "dataset_weights": None,
    "batch_by": None,  # these three: test_similar_batches.py
    "batch_clusters": None,
    "batch_vectors": None,
    "resume": None,  # test_restarts.py
    "cache_path": None,  # test_run_checks.py
    "max_failures": None,
    "eval_data": None,  # evaluation/test_in_training.py
    "eval_corpus": None,
    "license": None,  # test_card_spec.py
    "language": None,
    "keep_better": None,  # test_averaging_spec.py, test_weight_averages.py
    "average_checkpoints": 2,
    "use_mrl": None,  # required by mrl_dims, and nothing besides: test_training_spec.py
    "storage_path": "elsewhere",
    "kd_loss_type": "m3_kd_loss",
    "score_bands": "0.5=1",
    "directions": ["query_to_doc", "doc_to_query"],
    "partition_mode": "per_direction",
    "hardness_mode": "all_negatives",
    "pooling_method": "mean",
    "query_instruction_format": "{}: {}",
    "passage_instruction_format": "{}: {}",
}
# Flags that another flag requires.
REQUIRED = {
    name: {"use_lora": True}
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "save_merged_lora_model")
} | {
    "kd_loss_type": {"knowledge_distillation": True},
    "mrl_dims": {"use_mrl": True, "mrl_dims": [8]},
    "guide_model": {"false_negative_margin": 0.1},
    "teacher_temperature": {"knowledge_distillation": True},
    "contrastive_weight": {"knowledge_distillation": True},
    # required by soft_labels: compared with other bands
    "score_bands": {"knowledge_distillation": True, "kd_loss_type": "soft_labels", "score_bands": ["0.1=1"]},
    "partition_mode": {"directions": ["query_to_doc", "doc_to_query"]},
    "average_checkpoints": {"save_steps": 5},
    "hardness_strength": {"hardness_mode": "all_negatives"},
    "hardness_normalize": {"hardness_mode": "all_negatives"},
}


def worker_config(options: TrainOptions, folder: Path) -> dict[str, Any]:
    spec = TrainingSpec.from_options(options, FinetuneSpec)
    file = SourceFile("d", "/d", 100, "jsonl", 0)
    survey = Survey([file], [Block(0, 0, 100)], np.array([100]), np.array([100]), [], 0)
    data = spec.data.arrange(survey, spec.batch.global_batch(2, None), 2)
    planned = PlannedRun(spec, data, Plan(2, 1, 0), 1.0, None, TrialContext())
    config = WorkerConfig.of(planned, (folder / "marker",), None)
    # The model card and the report have every flag as it was given, which proves nothing.
    return {**contents(config), "card": {}, "flags": {}}


def contents(value: Any) -> Any:
    """Everything inside of a value, fields that repr() hides included."""
    if is_dataclass(value) or isinstance(value, Order):
        value = vars(value)
    if isinstance(value, dict):
        return {name: contents(each) for name, each in value.items()}
    return [contents(each) for each in value] if isinstance(value, list | tuple) else repr(value)


@pytest.mark.parametrize(
    "name",
    [f.name for f in declared_flags(TrainOptions).values() if not (f.refused or f.no_effect or f.transformers)],
)
def test_every_flag_changes_the_worker_config(name, tmp_path):
    f = declared_flags(TrainOptions)[name]
    flags = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}
    if (name in VALUES and VALUES[name] is None) or name in flags:
        pytest.skip("has a test of its own, or is always required")
    by_kind = {"bool": f.default is False, "int": 7, "float": 0.25, "str": "other", "json": {"a": 1}}
    value = VALUES.get(name, by_kind[f.kind])
    flags |= REQUIRED.get(name, {})
    first, again, changed = (
        worker_config(build_options(TrainOptions, given), tmp_path)
        for given in (flags, dict(flags), {**flags, name: value if isinstance(value, list) or not f.many else [value]})
    )
    assert first == again  # depends on the flags alone
    assert changed != first
