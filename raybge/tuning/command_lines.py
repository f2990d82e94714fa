"""Command lines that repeat a search or train the model of one of its trials again; secrets are omitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raybge.tuning.trial_spec import TrialSpec
from raybge.util.redaction import redact_settings


def reproduction_commands(trial_spec: TrialSpec, history: Sequence[tuple[int, Mapping[str, Any]]]) -> list[list[str]]:
    """Return the commands that train a trial's model again.

    raybge.mine is one of them if the trial mined. If hyperparameters changed during training, each further raybge.train
    continues from a checkpoint of the one before.

    Args:
        trial_spec: configuration of all trials.
        history: `Trial.history`.

    Returns:
        Words of each command line, in order.
    """
    commands = []
    for i, (step, hyperparameters) in enumerate(history):
        output = "OUTPUT_DIR" if len(history) == 1 else f"OUTPUT_DIR-{i + 1}"
        mining, training = trial_spec.stage_flags(hyperparameters, "MINED.jsonl", output)
        if mining:
            commands.append(command_words("mine", mining))
        if i:
            training["resume_from_checkpoint"] = f"OUTPUT_DIR-{i}/checkpoint-{step}"
        commands.append(command_words("train", training))
    return commands


def command_words(command: str, flags: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line.

    Args:
        command: name of the command, such as "train".
        flags: values by flag name; lists and JSON objects are written as the command reads them.

    Returns:
        The words, from `python` on.
    """
    words = ["python", "-m", f"raybge.{command}"]
    for name, value in redact_settings(flags).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
    return words
