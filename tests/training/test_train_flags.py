"""Every flag of training acts: it changes what a worker is told, or has a test of its own."""

from pathlib import Path

import numpy as np
import pytest

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build, declared
from raybge.cluster.resources import Plan
from raybge.training import run as training_run
from raybge.training import worker_config as module
from raybge.training.tasks.finetuning import FineTuning
from raybge.training.worker_config import TrialContext

OTHER = {
    "config": None,  # read by the parser
    "dry_run": None,  # test_train.py
    "verbose": None,  # the console's
    "address": None,  # test_cluster.py
    "num_workers": None,  # the plan's, test_cluster.py
    "use_gpu": None,
    "cpus_per_worker": None,
    "on_bad_rows": None,  # test_train.py
    "overwrite_output_dir": None,  # test_train.py
    "small_threshold": None,  # these four: data/test_datasets.py and test_train.py
    "drop_threshold": None,
    "same_dataset_within_batch": None,
    "dataset_weights": None,
    "resume": None,  # test_restarts.py
    "max_failures": None,
    "eval_data": None,  # test_validation.py
    "eval_corpus": None,
    "use_mrl": None,  # says nothing beside mrl_dims, which are refused without it: test_recipe.py
    "storage_path": "elsewhere",
    "kd_loss_type": "m3_kd_loss",
    "pooling_method": "mean",
    "query_instruction_format": "{}: {}",
    "passage_instruction_format": "{}: {}",
}
# what a flag is of use with
NEEDS = {
    name: {"use_lora": True}
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "save_merged_lora_model")
} | {"kd_loss_type": {"knowledge_distillation": True}}


def worker_config(arguments: TrainOptions, folder: Path) -> str:
    order = training_run._order(arguments, survey_of_nothing(), Plan(2, 1, 0))
    storage = Path(arguments.storage_path or folder)
    config = module.worker_config(
        arguments,
        FineTuning.of(arguments, survey_of_nothing()),
        Plan(2, 1, 0),
        1.0,
        survey_of_nothing(),
        order,
        folder,
        storage,
        (folder / "marker",),
        None,
        TrialContext(),
    )
    # the model card has every flag as it was given, so it would prove nothing
    return repr({**vars(config), "order": vars(config.order), "card": {}})


def survey_of_nothing():
    from raybge.data.jsonl import Block, SourceFile
    from raybge.data.survey import Survey

    file = SourceFile("d", "/d", 100, "jsonl", 0)
    return Survey([file], [Block(0, 0, 100)], np.array([100]), np.array([100]), [], 0)


@pytest.mark.parametrize(
    "name", [f.name for f in declared(TrainOptions).values() if not f.unbuilt and not f.transformers]
)
def test_every_flag_changes_what_a_worker_is_told(name, tmp_path):
    f = declared(TrainOptions)[name]
    given = {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"}
    if (name in OTHER and OTHER[name] is None) or name in given:
        pytest.skip("has a test of its own, or is needed always")
    numbers = {"bool": f.default is False, "int": 7, "float": 0.25, "str": "other", "json": {"a": 1}}
    value = OTHER.get(name, numbers[f.kind])
    given |= NEEDS.get(name, {})
    told = [
        worker_config(build(TrainOptions, flags), tmp_path)
        for flags in (given, dict(given), {**given, name: [value] if f.many else value})
    ]
    assert told[0] == told[1]  # nothing in it but the flags makes a difference
    assert told[2] != told[0]
