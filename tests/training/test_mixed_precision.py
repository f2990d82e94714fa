"""What runs in the precision of --bf16 beside the training step: evaluation, and the check of groups for overflows."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.model.encoder import Encoder
from raybge.model.precision import bf16_message
from raybge.training.health.run_state import RunStateStore
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.finetune_task import FinetuneTask
from raybge.training.worker import build_arguments
from raybge.util.errors import UserError


class RecordingValidation:
    """Validation that embeds one text, as the real one does."""

    last_result = None

    def measure(self, encoder: Encoder, step: int = 0) -> dict[str, float]:
        with torch.no_grad():
            encoder.model.embed(encoder.tokenize(["what is a lane"], 8), 100)
        return {"nDCG@10": 0.5, "MRR@10": 0.5}


def test_evaluation_and_check_of_groups_run_in_the_precision_of_training(make_trainer):
    validation = RecordingValidation()
    trainer = make_trainer(validation=validation, bf16=True, max_steps=1)
    seen: list[torch.dtype] = []
    layer = trainer.encoder.model.backbone.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert seen and set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.evaluate()
    assert seen == [torch.bfloat16]
    seen.clear()
    (batch,) = (inputs["batch"] for inputs in list(trainer.stream)[:1])
    assert trainer._finite_rows(batch) == [True] * 6
    assert seen and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tokens", "texts", "remedy"),
    [(None, 18, "--sub_batch_size 9 or less"), (32, 2, r"--sub_batch_tokens \d\d or less")],
    ids=["all texts", "tokens"],
)
def test_memory_that_runs_out_is_explained(make_trainer, monkeypatch, tokens, texts, remedy):
    trainer = make_trainer(max_steps=1)
    trainer.components.model.sub_batch_tokens = tokens

    def embed(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(trainer.components.model.embedding, "embed", embed)  # like the optimizer, or an evaluation
    with pytest.raises(UserError) as raised:
        trainer.train()
    assert re.fullmatch(
        rf"the GPU's memory ran out in step 1, whose largest chunk has {texts} texts of up to \d+ tokens: give "
        rf"{remedy}, or --gradient_checkpointing True \(CUDA out of memory. Tried to allocate .*\)",
        str(raised.value),
    )


def test_memory_that_runs_out_in_the_check_of_packed_texts_is_explained(tiny, monkeypatch):
    def check(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr("raybge.model.packing.prepare_for_training", check)
    options = build_options(TrainOptions, {"model_name_or_path": tiny(), "train_data": ["d"], "output_dir": "o"})
    args = SimpleNamespace(device="cpu", torch_compile=False, activation_checkpointing=False, bf16=True, fp16=False)
    with pytest.raises(UserError, match=r"before the first step: give --use_lora True, .* \(CUDA out of memory"):
        FinetuneTask(FinetuneSpec.from_options(options)).build(args)


def test_a_sharded_model_runs_under_autocast_with_a_loss_in_fp32(make_trainer):
    """accelerate does not wrap a model that FSDP shards: the Trainer's own step does."""
    trainer = make_trainer(bf16=True, max_steps=1)
    trainer.is_fsdp_enabled = True
    model, seen = trainer.components.model, []
    layer = trainer.encoder.model.backbone.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    inputs = next(iter(trainer.stream))
    assert trainer.compute_loss(model, inputs).dtype == torch.float32
    assert seen and set(seen) == {torch.bfloat16}


def test_a_sharded_model_keeps_its_weights_in_fp32_and_gathers_them_by_layer(make_trainer, monkeypatch):
    plugin = SimpleNamespace(mixed_precision_policy="accelerate's own, in bf16", transformer_cls_names_to_wrap=None)
    create = transformers.Trainer.create_accelerator_and_postprocess

    def create_sharded(self) -> None:
        create(self)
        self.is_fsdp_enabled = True
        monkeypatch.setitem(self.accelerator.state.__dict__, "fsdp_plugin", plugin)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", create_sharded)
    make_trainer(bf16=True)
    assert plugin.mixed_precision_policy is None and plugin.transformer_cls_names_to_wrap == ["BertLayer"]


def test_a_gpu_without_bf16_is_named_with_what_to_use(tmp_path, monkeypatch):
    config = SimpleNamespace(training={"output_dir": str(tmp_path), "bf16": True}, validation=None, resume_from=None)
    with pytest.raises(UserError, match=r"doesn't support bf16.*; use --fp16 True, or fp32$"):
        build_arguments(config)
    for name, value in (("get_device_name", "Tesla T4"), ("get_device_capability", (7, 5))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    message = bf16_message(torch.device("cuda"))
    assert message == (
        "--bf16 is slow on Tesla T4: compute capability 8.0 or more has it in hardware, this GPU has 7.5; "
        "--fp16 True is faster"
    )
    assert bf16_message(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert bf16_message(torch.device("cuda")) is None


@pytest.mark.parametrize("gains", [True, False])
def test_bf16_on_a_cpu_requires_units_for_it(tmp_path, monkeypatch, gains):
    training = {"output_dir": str(tmp_path), "bf16": True, "use_cpu": True}
    monkeypatch.setattr("raybge.training.worker.cpu_has_bf16_units", lambda: gains)
    config = SimpleNamespace(training=training, validation=None, resume_from=None)
    assert build_arguments(config).bf16 is gains
    training["bf16"] = False
    assert build_arguments(config).bf16 is False


def test_workers_with_the_same_message_show_one_line():
    store = RunStateStore()
    for line in ("texts are padded", "texts are padded", "step 3 was skipped"):
        store.add_message(line)
    assert store.read().messages == ["texts are padded", "step 3 was skipped"]
