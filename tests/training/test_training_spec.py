"""Specs of a training run: each mistake in the flags has its message, each flag its field."""

from types import SimpleNamespace

import pytest
from tiny import make_tiny

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.losses.objective import Objective
from raybge.model.folder import FolderSettings, vector_width, write_settings
from raybge.training.spec import BatchSpec, RunSpec, TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.finetune_task import FinetuneTask
from raybge.util.errors import UserError

DISTILLED = {"knowledge_distillation": True}
ARGS = SimpleNamespace(device="cpu", torch_compile=False, activation_checkpointing=False, bf16=False, fp16=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def options_of(model: str, **flags) -> TrainOptions:
    return build_options(TrainOptions, {"model_name_or_path": model, "train_data": ["d"], "output_dir": "o", **flags})


def finetune_spec(model: str, **flags) -> FinetuneSpec:
    return FinetuneSpec.from_options(options_of(model, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0, found 0.0"),
        ({"temperature": 0.6}, "--temperature must be at most 0.5 with normalized vectors, found 0.6"),
        ({"train_group_size": 0}, "--train_group_size must be at least 1, found 0"),
        ({"score_block": 0}, "--score_block must be at least 1, found 0"),
        ({"sub_batch_size": 0}, "--sub_batch_size must be at least 1, or -1"),
        ({"sub_batch_tokens": 0}, "--sub_batch_tokens must be at least 1, found 0"),
        ({"sub_batch_size": 8, "sub_batch_tokens": 512}, "--sub_batch_size and --sub_batch_tokens .* give one"),
        ({"shuffle_ratio": 1.5}, "--shuffle_ratio must be from 0 to 1, found 1.5"),
        ({"use_mrl": True}, "--use_mrl requires --mrl_dims"),
        ({"use_mrl": True, "mrl_dims": [8, 17]}, "--mrl_dims must be from 1 to 16, the model's width, found 17"),
        ({"use_mrl": True, "mrl_dims": [0]}, "--mrl_dims must be from 1 to 16"),
        ({"use_mrl": True, "mrl_dims": [8, 8]}, "--mrl_dims must be different lengths, found 8 8"),
        ({"mrl_dims": [8]}, "--mrl_dims requires --use_mrl"),
        ({"kd_loss_type": "m3_kd_loss"}, "--kd_loss_type requires --knowledge_distillation"),
        ({"knowledge_distillation": True, "train_group_size": 1}, "--train_group_size must be above 1"),
        ({"bidirectional": True, "use_inbatch_neg": False}, "--bidirectional .* requires --use_inbatch_neg"),
        ({"bidirectional": True, "directions": ["query_to_doc"]}, "give one of --bidirectional and --directions"),
        ({"directions": ["doc_to_query"]}, "--directions must have query_to_doc"),
        ({"directions": ["query_to_doc", "doc_to_doc"], "use_inbatch_neg": False}, "doc_to_doc .* --use_inbatch_neg"),
        ({"partition_mode": "per_direction"}, "--partition_mode requires --directions"),
        ({"directions": ["query_to_doc"], "partition_mode": "per_direction"}, "a direction besides query_to_doc"),
        (
            {"directions": ["query_to_doc", "query_to_query"], "partition_mode": "per_direction"},
            "--partition_mode per_direction: query_to_query has no positive",
        ),
        (
            {"directions": ["query_to_doc", "doc_to_query"], **DISTILLED, "kd_loss_type": "m3_kd_loss"},
            "--directions: --kd_loss_type m3_kd_loss replaces the softmax",
        ),
        ({"hardness_strength": 5.0}, "--hardness_strength requires --hardness_mode"),
        ({"hardness_normalize": True}, "--hardness_normalize requires --hardness_mode"),
        (
            {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
            "--hardness_strength must be above 0, found 0.0",
        ),
        (
            {"hardness_mode": "all_negatives", **DISTILLED, "kd_loss_type": "m3_kd_loss"},
            "--hardness_mode weights the negatives of the loss that --kd_loss_type m3_kd_loss replaces",
        ),
        (
            {"hardness_mode": "in_batch_negatives", "use_inbatch_neg": False},
            "in_batch_negatives requires --use_inbatch",
        ),
        ({"hardness_mode": "hard_negatives", "train_group_size": 1}, "--train_group_size must be above 1"),
        ({"teacher_temperature": 2.0}, "--teacher_temperature requires --knowledge_distillation"),
        ({"contrastive_weight": 2.0}, "--contrastive_weight requires --knowledge_distillation"),
        ({"score_bands": ["1=1"]}, "--score_bands requires --knowledge_distillation"),
        ({**DISTILLED, "teacher_temperature": 0.0}, "--teacher_temperature must be above 0, found 0.0"),
        (
            {**DISTILLED, "kd_loss_type": "cosent", "teacher_temperature": 2.0},
            "--teacher_temperature has no effect with --kd_loss_type cosent",
        ),
        ({**DISTILLED, "contrastive_weight": -1.0}, "--contrastive_weight must be at least 0, found -1.0"),
        (
            {**DISTILLED, "kd_loss_type": "m3_kd_loss", "contrastive_weight": 0.5},
            "--contrastive_weight has no effect with --kd_loss_type m3_kd_loss",
        ),
        ({**DISTILLED, "kd_loss_type": "soft_labels"}, "soft_labels and --score_bands belong together"),
        ({**DISTILLED, "score_bands": ["0.5=1"]}, "soft_labels and --score_bands belong together"),
        (
            {**DISTILLED, "kd_loss_type": "soft_labels", "score_bands": ["0.5"]},
            "--score_bands 0.5: expected BOUND=LABEL",
        ),
        ({**DISTILLED, "kd_loss_type": "soft_labels", "score_bands": ["1=-1"]}, "--score_bands 1=-1: expected"),
        ({**DISTILLED, "kd_loss_type": "soft_labels", "score_bands": ["1=1", "1.0=2"]}, "each bound once"),
        ({**DISTILLED, "kd_loss_type": "soft_labels", "score_bands": ["1=0"]}, "at least one label must be above 0"),
        ({**DISTILLED, "kd_loss_type": "cosent", "negatives_cross_device": False}, "cosent .*--negatives_cross_device"),
        ({"guide_model": "nowhere/at/all", "false_negative_margin": 0.1}, "--guide_model nowhere/at/all: no such"),
        ({"guide_model": "m"}, "--guide_model requires --false_negative_margin"),
        ({"query_max_len": 0}, "--query_max_len must be at least 1, found 0"),
        ({"passage_max_len": 0}, "--passage_max_len must be at least 1, found 0"),
        ({"pad_to_multiple_of": 0}, "--pad_to_multiple_of must be at least 1, found 0"),
        ({"lora_rank": 8}, "--lora_rank requires --use_lora"),
        ({"lora_alpha": 8.0}, "--lora_alpha requires --use_lora"),
        ({"lora_dropout": 0.0}, "--lora_dropout requires --use_lora"),
        ({"target_modules": ["query"]}, "--target_modules requires --use_lora"),
        ({"save_merged_lora_model": True}, "--save_merged_lora_model requires --use_lora"),
        ({"use_lora": True, "fix_position_embedding": True}, "--fix_position_embedding has no effect with --use_lora"),
        ({"use_lora": True, "config_name": "m"}, "--config_name: adapters have no configuration .* add --save_merged"),
        # of several mistakes the first in the order of the checks
        ({"train_group_size": 0, "shuffle_ratio": 2.0}, "--train_group_size"),
        ({"shuffle_ratio": 2.0, "sub_batch_size": 0}, "--shuffle_ratio"),
        ({"sub_batch_size": 0, "temperature": 0.0}, "--sub_batch_size"),
        ({"temperature": 0.0, "kd_loss_type": "m3_kd_loss"}, "--temperature"),
        ({"kd_loss_type": "m3_kd_loss", "mrl_dims": [8]}, "--kd_loss_type"),
        ({"mrl_dims": [8], "guide_model": "m"}, "--mrl_dims"),
        ({"guide_model": "m", "lora_rank": 8}, "--guide_model"),
        ({"lora_rank": 8, "temperature": 0.6}, "--lora_rank"),
        ({"temperature": 0.6, "use_mrl": True}, "--temperature"),
        ({"eval_corpus": ["c"]}, "--eval_corpus .* give --eval_data too"),
        ({"dataset_weights": ["a=0"]}, "a=0"),
        ({"global_batch_size": 0}, "--global_batch_size must be at least 1, found 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1, found 0"),
        ({"max_failures": -2}, r"--max_failures must be at least -1 \(no limit\), found -2"),
        ({"stall_timeout": -1.0}, r"--stall_timeout must be at least 0 \(off\), found -1.0"),
        ({"max_bad_steps": -1}, r"--max_bad_steps must be at least 0 \(off\), found -1"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_flags_are_named(tiny, flags, message):
    with pytest.raises(UserError, match=message):
        TrainingSpec.from_options(options_of(tiny, **flags), FinetuneSpec)


def test_use_cpu_leaves_the_gpus_alone(tiny):
    """Also if the cluster has GPUs and --use_gpu is set in a configuration file."""
    used = [
        TrainingSpec.from_options(options_of(tiny, **flags), FinetuneSpec).scale.use_gpu
        for flags in ({}, {"use_gpu": True}, {"use_cpu": True}, {"use_cpu": True, "use_gpu": True})
    ]
    assert used == [None, True, False, False]


def test_valid_flags_pass(tiny):
    flags = {"use_mrl": True, "mrl_dims": [8, 16], "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}
    flags |= {"guide_model": tiny, "false_negative_margin": 0.0, "bidirectional": True, "sub_batch_size": -1}
    objective = finetune_spec(tiny, **flags).objective.objective(normalized=True)
    assert (objective.directions, objective.partition_mode) == (("query_to_doc", "doc_to_query"), "per_direction")
    scores_of_any_size = finetune_spec(tiny, temperature=0.9, normalize_embeddings=False)
    assert scores_of_any_size.objective.objective(normalized=False).temperature == 0.9


def test_every_flag_of_the_objective_has_its_field(tiny):
    assert finetune_spec(tiny).objective.objective(normalized=True) == Objective(0.02, block=8)
    flags = {"temperature": 0.05, "use_inbatch_neg": False, "negatives_cross_device": False}
    flags |= {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss", "use_mrl": True, "mrl_dims": [4, 8]}
    flags |= {
        "mask_known_positives": False,
        "false_negative_margin": 0.2,
        "score_block": 64,
        "per_device_train_batch_size": 3,
    }
    assert finetune_spec(tiny, **flags).objective.objective(normalized=False) == Objective(
        0.05,
        in_batch=False,
        cross_device=False,
        block=3,
        distillation="m3_kd_loss",
        mrl_dims=(4, 8),
        normalized=False,
        mask_known=False,
        margin=0.2,
        score_block=64,
    )
    flags = {"directions": ["query_to_doc", "doc_to_doc"], "hardness_mode": "all_negatives", "hardness_strength": 3.0}
    flags |= {"hardness_normalize": True, "knowledge_distillation": True, "kd_loss_type": "margin_mse"}
    flags |= {"teacher_temperature": 4.0, "contrastive_weight": 0.5}
    assert finetune_spec(tiny, **flags).objective.objective(normalized=True) == Objective(
        0.02,
        block=8,
        directions=("query_to_doc", "doc_to_doc"),
        hardness_mode="all_negatives",
        hardness_strength=3.0,
        hardness_normalize=True,
        distillation="margin_mse",
        teacher_temperature=4.0,
        contrastive_weight=0.5,
    )


def test_bidirectional_is_short_for_two_directions(tiny):
    directions = {"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction"}
    assert finetune_spec(tiny, bidirectional=True).objective == finetune_spec(tiny, **directions).objective


def test_score_bands_are_in_the_order_of_their_bounds(tiny):
    flags = {"knowledge_distillation": True, "kd_loss_type": "soft_labels", "score_bands": ["0.8=1", "-2=.25"]}
    assert finetune_spec(tiny, **flags).objective.score_bands == ((-2.0, 0.25), (0.8, 1.0))


@pytest.mark.parametrize(("mode", "strength"), [("in_batch_negatives", 9.0), ("hard_negatives", 5.0)])
def test_hardness_has_the_published_strength(tiny, mode, strength):
    assert finetune_spec(tiny, hardness_mode=mode).objective.hardness_strength == strength


@pytest.mark.parametrize("normalize", [None, True, False])
def test_the_objective_is_normalized_like_the_model(tiny, normalize):
    task = FinetuneTask(finetune_spec(tiny, normalize_embeddings=normalize))
    model = task.build(ARGS).model
    assert model.objective.normalized == model.embedding.normalize == (normalize is not False)


def test_sub_batch_size_below_zero_holds_all_texts(tiny):
    sizes = {size: finetune_spec(tiny, sub_batch_size=size).sub_batch_size for size in (None, -1, 16)}
    assert sizes == {None: None, -1: None, 16: 16}


def test_lengths_are_limited_to_what_the_model_holds(tiny):
    task = FinetuneTask(finetune_spec(tiny, query_max_len=8, passage_max_len=999))
    texts = task.build(ARGS).tokenizer.texts
    assert (texts.query_max_len, texts.passage_max_len) == (8, 32)


def test_a_run_that_continues_keeps_its_global_batch():
    start = SimpleNamespace(identity=SimpleNamespace(global_batch=24))
    assert BatchSpec(None, 8).global_batch(2, None) == 16
    assert BatchSpec(None, 8).global_batch(2, start) == 24
    assert BatchSpec(12, 8).global_batch(2, start) == 12


def test_the_runs_own_files_are_in_a_folder(tiny, tmp_path, monkeypatch):
    """Next to the checkpoints, or in the output folder if these are at a URI."""
    monkeypatch.chdir(tmp_path)
    run = RunSpec.from_options(options_of(tiny, storage_path="elsewhere"))
    assert (run.output, run.storage, run.work) == (tmp_path / "o", f"{tmp_path}/elsewhere", tmp_path / "elsewhere")
    uri = f"fsspec+file://{tmp_path}/elsewhere"
    run = RunSpec.from_options(options_of(tiny, storage_path=uri))
    assert (run.storage, run.work) == (uri, tmp_path / "o")


def test_width_is_read_without_loading_the_model(tiny, tmp_path):
    assert vector_width(tiny) == 16
    inside = tmp_path / "0_Transformer"
    make_tiny(inside)
    write_settings(tmp_path, FolderSettings(), 16, {})
    modules = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(modules.replace('"path": ""', '"path": "0_Transformer"', 1))
    assert vector_width(str(tmp_path)) == 16
    assert vector_width(str(tmp_path / "1_Pooling")) is None
