"""Fine-tuning in a worker: every field of the spec reaches the model, the objective or the tokenizer."""

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from packed_kernels import packed_kernels
from tiny import make_tiny

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.model.embedding import position_tables
from raybge.model.spec import EncoderSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.finetune_task import FinetuneTask
from raybge.training.tasks.task import TaskComponents

ARGS = SimpleNamespace(device="cpu", torch_compile=False, activation_checkpointing=False, bf16=False, fp16=False)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> FinetuneSpec:
    model = make_tiny(tmp_path_factory.mktemp("model") / "tiny")
    flags = {"model_name_or_path": model, "train_data": ["d"], "output_dir": "o"}
    return FinetuneSpec.from_options(build_options(TrainOptions, flags))


def trains_positions(components: TaskComponents) -> bool:
    (table,) = position_tables(components.backbone)
    return bool(table.weight.requires_grad)


# The value of a field in what `build` returns.
PLACES: dict[str, Callable[[TaskComponents], Any]] = {
    "query_max_len": lambda c: c.tokenizer.texts.query_max_len,
    "passage_max_len": lambda c: c.tokenizer.texts.passage_max_len,
    "group_size": lambda c: c.tokenizer.group_size,
    "seed": lambda c: c.tokenizer.seed,
    "shuffle_ratio": lambda c: c.tokenizer.shuffle_ratio,
    "scored": lambda c: c.tokenizer.scored,
    "sub_batch_size": lambda c: c.model.sub_batch_size,
    "sub_batch_tokens": lambda c: c.model.sub_batch_tokens,
    "pad_to_multiple_of": lambda c: c.model.pad_to_multiple_of,
    "fix_position_embedding": lambda c: not trains_positions(c),
}
VALUES = {"shuffle_ratio": 0.25, "scored": True, "fix_position_embedding": True}  # of the others: 7
ELSEWHERE = {
    "encoder",  # these two: below
    "objective",
    "guide",
    "base_model",  # of messages and the model card
    "merge_adapters",  # when the model is saved: test_train.py
    "validation",  # read by the driver: evaluation/test_in_training.py
    "allow_unknown_tokens",  # read by the driver: model/test_preflight.py
}


def test_every_field_has_a_test():
    assert {field.name for field in fields(FinetuneSpec)} == PLACES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", PLACES)
def test_a_field_reaches_its_place(spec, name):
    value = VALUES.get(name, 7)
    plain, changed = (FinetuneTask(each).build(ARGS) for each in (spec, replace(spec, **{name: value})))
    assert PLACES[name](changed) == value != PLACES[name](plain)
    others = [place for other, place in PLACES.items() if other != name]
    assert [place(changed) for place in others] == [place(plain) for place in others]


# Of each field of the objective, another value than the default.
OBJECTIVE = {
    "temperature": 0.5,
    "in_batch": False,
    "cross_device": False,
    "block": 3,
    "directions": ("query_to_doc", "doc_to_query"),
    "partition_mode": "per_direction",
    "hardness_mode": "all_negatives",
    "hardness_strength": 3.0,
    "hardness_normalize": True,
    "distillation": "m3_kd_loss",
    "teacher_temperature": 2.0,
    "contrastive_weight": 0.5,
    "score_bands": ((0.5, 1.0),),
    "mrl_dims": (4, 8),
    "mask_known": False,
    "margin": 0.25,
    "score_block": 5,
}


@pytest.mark.parametrize("name", OBJECTIVE)
def test_a_field_of_the_objective_reaches_it(spec, name):
    assert {field.name for field in fields(spec.objective)} == OBJECTIVE.keys()
    changed = replace(spec, objective=replace(spec.objective, **{name: OBJECTIVE[name]}))
    plain, objective = (FinetuneTask(each).build(ARGS).model.objective for each in (spec, changed))
    assert objective == replace(plain, **{name: OBJECTIVE[name]}) != plain


def test_the_encoder_is_that_of_the_spec(spec):
    encoder = replace(spec.encoder, pooling_method="mean", query_instruction_for_retrieval="what is ")
    components = FinetuneTask(replace(spec, encoder=encoder)).build(ARGS)
    assert components.encoder.model is components.model.embedding
    assert components.model.embedding.pooling == "mean"
    assert components.tokenizer.texts.instructions.query_text("a lane") == "what is a lane"
    assert components.backbone is components.model.embedding.backbone


def test_a_guide_gets_a_tokenizer_of_its_own(spec, tmp_path):
    """Its texts have the lengths of the flags, and its own prompts."""
    guide = EncoderSpec(make_tiny(tmp_path / "guide", "roberta"), use_fp16=False)
    components = FinetuneTask(replace(spec, guide=guide, query_max_len=7)).build(ARGS)
    (own,) = components.model._guide
    assert own.backbone.config.model_type == "roberta"
    assert components.tokenizer.guide.tokenizer.cls_token == "<s>"
    assert components.tokenizer.guide.query_max_len == components.tokenizer.texts.query_max_len == 7
    assert not [name for name, _ in components.model.named_parameters() if "guide" in name]
    plain = FinetuneTask(spec).build(ARGS)
    assert plain.tokenizer.guide is None and plain.model._guide == (None,)


def test_a_guide_packs_its_texts_on_a_gpu_or_says_why_not(spec, tmp_path, monkeypatch):
    """Checked by itself, in the precision of the run."""
    guide = EncoderSpec(make_tiny(tmp_path / "guide", "roberta"), use_fp16=False)
    args = SimpleNamespace(**{**vars(ARGS), "bf16": True})
    calls: list[str] = []
    with packed_kernels(calls):
        components = FinetuneTask(replace(spec, guide=guide)).build(args)
        (own,) = components.model._guide
        assert own.packs and components.model.embedding.packs and components.messages == ()
        assert "flash" in calls
        monkeypatch.setattr("raybge.model.packing._vector_difference", lambda model, precision: f"wrong in {precision}")
        components = FinetuneTask(replace(spec, guide=guide)).build(args)
    (own,) = components.model._guide
    assert components.messages == ("texts of the guide model are padded, not packed: wrong in torch.bfloat16",)
    assert not own.packs and components.model.embedding.packs


def test_files_whose_queries_are_alone_reach_the_tokenizer(spec):
    assert FinetuneTask(spec, frozenset({1, 4})).build(ARGS).tokenizer.alone == {1, 4}


def test_torch_compile_compiles_the_network_only(spec):
    """The Trainer would compile the module around it again, hence its arguments are reset."""
    args = SimpleNamespace(
        device="cpu", torch_compile=True, torch_compile_backend="eager", torch_compile_mode="default"
    )
    components = FinetuneTask(spec).build(args)
    assert components.backbone._compiled_call_impl is not None
    assert components.model._compiled_call_impl is None
    assert (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode) == (False, None, None)
