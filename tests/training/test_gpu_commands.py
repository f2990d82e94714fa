"""The training commands of README and of jobs/recipe.py on the path of a GPU, whose kernels are replaced by loops."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packed_kernels import packed_kernels
from tiny import make_tiny
from trainers import LocalStream

from raybge.cli.options import TrainOptions
from raybge.cli.parser import parse_options
from raybge.cluster.resources import Plan
from raybge.training.checkpoint.manifest import RunIdentity
from raybge.training.spec import TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.trainer import StreamTrainer, TrainerContext
from raybge.training.trainer_arguments import training_arguments

ROOT = Path(__file__).parents[2]


def readme_commands() -> list[list[str]]:
    """Return the flags of each complete training command of README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ *python -m raybge\.train (.*)$", text, re.MULTILINE)
    return [shlex.split(command) for command in commands if "..." not in command]


def recipe_command() -> list[str]:
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        from recipe import TRAINING
    finally:
        sys.path.remove(str(ROOT / "jobs"))
    flags = [str(word) for name, value in TRAINING.items() for word in (f"--{name}", value)]
    return ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o", *flags]


COMMANDS = {
    **{f"README {i}": command for i, command in enumerate(readme_commands())},
    "recipe": recipe_command(),
    "sub-batches with checkpointing": [*recipe_command(), "--gradient_checkpointing", "True"],
}


def test_commands_are_found():
    flags = {word for command in COMMANDS.values() for word in command}
    assert len(COMMANDS) >= 6 and {"--bf16", "--use_lora", "--gradient_checkpointing", "--sub_batch_size"} <= flags


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_trains_on_packed_texts(name, survey, tmp_path, monkeypatch):
    monkeypatch.setattr("raybge.losses.contrastive_model.CPU_TOKENS_PER_CHUNK", 40)  # several chunks a step
    words = list(COMMANDS[name])
    at = words.index("--model_name_or_path") + 1
    kind = "qwen3" if "Qwen" in words[at] else "bert"
    if "--batch_vectors" in words:  # the order of the rows does not change the path of the GPU
        vectors = words.index("--batch_vectors")
        del words[vectors : vectors + 2]
    words[at] = make_tiny(tmp_path / "model", kind, dropout=0.1)
    spec = TrainingSpec.from_options(parse_options(TrainOptions, words, "raybge.train"), FinetuneSpec)
    data = spec.data.arrange(survey, 6, 1)
    flags = training_arguments(spec.trainer, Plan(1, 1, 1), data.order, tmp_path) | {"use_cpu": True, "max_steps": 2}
    args = transformers.TrainingArguments(**flags)
    calls = []
    with packed_kernels(calls):
        components = spec.task.task(survey, data.data_sets).build(args)
        assert components.messages == () and components.model.embedding.packs
        stream = LocalStream(survey, data.order, components.tokenizer, 0, 1, 1.0)
        identity = RunIdentity.of(survey, data.order, args.gradient_accumulation_steps)
        before = [p.detach().clone() for p in components.model.parameters()]
        calls.clear()
        StreamTrainer(stream, components, TrainerContext(identity=identity), args=args).train()
    trained = [
        not torch.equal(p, old) for p, old in zip(components.model.parameters(), before, strict=True) if p.requires_grad
    ]
    assert sum(trained) > 0.8 * len(trained) > 0  # new adapters' first factors have no gradient in the first step
    assert all(p.isfinite().all() for p in components.model.parameters())
    assert {*calls} == {"flash" if args.bf16 else "efficient"}
