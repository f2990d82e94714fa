"""Loading of a checkpoint's state into a trainer that continues from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from raybge.evaluation.query_examples import RetrievalResult
from raybge.training.checkpoint.training_state import load_training_state

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer

FIRST_RESULT = "first_evaluation.npz"  # in a checkpoint: each query's result before the first step


class StateLoader(transformers.TrainerCallback):
    """Loads the state of training once the Trainer has prepared model, optimizer and schedule."""

    def __init__(self, trainer: StreamTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load the state if the run continues from a checkpoint."""
        if self._trainer.resume_folder:
            load_training_state(self._trainer, self._trainer.resume_folder)
            first = Path(self._trainer.resume_folder, FIRST_RESULT)
            if first.is_file():
                self._trainer.first_result = RetrievalResult.load(first)
