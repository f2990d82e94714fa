"""Averages of a model's trained weights: exponential moving average over updates, and mean of checkpoints.

Every worker holds the averages of the weights that it holds itself: all of them in data-parallel training, its shards
with FSDP. They depend on the weights alone, so they are equal for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from raybge.training.checkpoint.safe_load import safe_loading
from raybge.training.checkpoint.training_state import Write
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.training.trainer import StreamTrainer

EMA_FILE = "ema.pt"  # in a checkpoint


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name: with adapters these alone."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def held_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies in fp32 of the trained weights, or shards of them, that this worker holds, by name."""
    return {name: _held(weight).float().clone() for name, weight in trained_parameters(model).items()}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights as `held_weights` returns them into the model, in place."""
    for name, parameter in trained_parameters(model).items():
        _held(parameter).copy_(weights[name])


class WeightEma:
    """Exponential moving average of the trained weights over the updates of a run.

    After update t it is the mean of the weights after updates 1 to t, weighted by decay ** (t - i): an average whose
    start is corrected as in Adam, https://arxiv.org/abs/1412.6980. The weights before training have no part in it.

    Args:
        model: the model; if it is to be sharded, it is already.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._model = model
        # Sharded like the parameters, so that all of them can be written and read for any number of workers.
        self._averages = {
            name: torch.zeros_like(weight.detach(), dtype=torch.float32)
            for name, weight in trained_parameters(model).items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after update `step`, counted from 1."""
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, weight in trained_parameters(self._model).items():
            _held(self._averages[name]).lerp_(_held(weight).float(), share)

    def held(self) -> dict[str, Tensor]:
        """Return the averages as `held_weights` returns weights."""
        return {name: _held(average) for name, average in self._averages.items()}

    def save(self, folder: str, is_main: bool, write: Write) -> None:
        """Write the averages into a checkpoint's folder. Collective.

        Args:
            folder: the checkpoint's folder.
            is_main: this worker writes the file.
            write: runs the action that writes, with retries.
        """
        whole = {}
        for name, average in self._averages.items():
            tensor = average.full_tensor() if isinstance(average, DTensor) else average
            if is_main:
                whole[name] = tensor.cpu()
        if is_main:
            write(lambda: torch.save({"decay": self.decay, "averages": whole}, Path(folder, EMA_FILE)))

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Read the averages of a checkpoint. Collective.

        Args:
            folder: local folder of the checkpoint.

        Raises:
            UserError: the checkpoint has none, or those of another model or another decay.
        """
        path = Path(folder, EMA_FILE)
        if not path.is_file():
            raise UserError(
                f"{folder} cannot be continued with --ema: its run had no such average; remove --ema, or start anew "
                "with --overwrite_output_dir"
            )
        with safe_loading(folder, "moving average"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        whole: dict[str, Tensor] = saved["averages"]
        if saved["decay"] != self.decay:
            raise UserError(f"--ema {self.decay:g}: the run to continue has --ema {saved['decay']:g}; use the same")
        shapes, expected = ({name: each.shape for name, each in w.items()} for w in (whole, self._averages))
        if shapes != expected:
            raise UserError(f"{path} has the averages of another model; expected a checkpoint of the same run")
        for name, average in self._averages.items():
            value: Any = whole[name].to(average.device)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements).to_local()
            _held(average).copy_(value)


class EmaCallback(transformers.TrainerCallback):
    """Adds the weights of each update to the trainer's `ema`, after loading it where the run continues.

    Args:
        trainer: the trainer.
        decay: decay of the average.
    """

    def __init__(self, trainer: StreamTrainer, decay: float):
        self._trainer = trainer
        self._decay = decay

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Create the average, once the model is sharded."""
        self._trainer.ema = WeightEma(self._trainer.model, self._decay)
        if self._trainer.resume_folder:
            self._trainer.ema.load(self._trainer.resume_folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the weights, before a checkpoint of this update is written."""
        assert self._trainer.ema is not None
        self._trainer.ema.update(state.global_step)


def mean_of_checkpoints(trainer: StreamTrainer, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return the mean of the weights of checkpoints, as `held_weights` returns weights. Collective.

    Args:
        trainer: the trainer, whose model then has the weights of the last of them.
        paths: folders or URIs of the checkpoints, at least one.

    Returns:
        The mean by name, in fp32.
    """
    total: dict[str, Tensor] = {}
    count = 0
    for path in paths:
        trainer.load_weights(path)
        weights = held_weights(trainer.model)
        total = {name: total[name] + weight for name, weight in weights.items()} if total else weights
        count += 1
    return {name: weight / count for name, weight in total.items()}


def _held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this worker holds, which shares its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
