"""Guard against losses and gradients that are not finite: skips the update, ends the run if they persist.

Data-parallel training sums gradients over workers: a value that is not finite on one worker is then not finite on all
of them, so that all decide alike without communication. They communicate only after such a value.

To read the norm of a gradient, the host would wait for a GPU in each update. Where the optimizer can leave out an
update by itself, the guard reads it one update later instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybge.compat.torch import skip_step_where
from raybge.data.stream import Batch
from raybge.util.errors import UserError

MAX_NAMED_ROWS = 5

# Returns for each row of a batch whether its embeddings are finite; None if the model is not contrastive.
FiniteRows = Callable[[Batch], Sequence[bool] | None]


def runs_behind_host(device: torch.device) -> bool:
    """Return True if the host does not wait for the operations of a device, and must not in each update."""
    return device.type == "cuda"


class HostCopy:
    """Number of a device on its way to the host, which waits for it only where it reads it."""

    def __init__(self, scalar: Tensor):
        """Start the copy; `scalar` is a tensor of one number."""
        self._number = scalar.detach().to("cpu", non_blocking=True)
        self._event = None
        if scalar.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(scalar.device))

    def __float__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)


@dataclass(frozen=True)
class PostponedUpdate:
    """Update whose norm is not read yet; the optimizer leaves it out by itself if it is not finite."""

    number: int
    norm: HostCopy
    steps: list[tuple[Tensor, Batch]]


class NonFiniteGuard:
    """Guard of one worker's updates.

    Args:
        limit: consecutive non-finite updates that end the run.
        files: names of the data files, in the order of their numbers.
        log: called with a line for the user.
    """

    def __init__(self, limit: int, files: Sequence[str], log: Callable[[str], None]):
        self.limit = limit
        self.files = files
        self.log = log
        self.consecutive = 0
        self._steps: list[tuple[Tensor, Batch]] = []  # of the current update
        self._postponed: PostponedUpdate | None = None

    def add_step(self, loss: Tensor, batch: Batch) -> Tensor:
        """Record one step of the current update.

        Args:
            loss: loss of this worker's share, scalar.
            batch: the share.

        Returns:
            The loss, with a gradient that is finite only if the loss is.
        """
        self._steps.append((loss.detach(), batch))
        return loss * (1 + 0 * loss.detach())

    def check_loss(self, update: int, finite_rows: FiniteRows) -> None:
        """Check the loss before a backward pass that includes the update, as DeepSpeed's does. Collective.

        Args:
            update: number of the update, counted from 1.
            finite_rows: finds the rows that cause it.

        Raises:
            UserError: on all workers, if the loss of any worker is not finite: the update cannot be skipped.
        """
        ((loss, batch),), self._steps = self._steps, []
        nonfinite = 1 - loss.isfinite().float()
        if dist.is_initialized():
            dist.all_reduce(nonfinite)
        if nonfinite:
            mean_loss, rows = self._find_rows([(loss, batch)], finite_rows)
            raise UserError(
                f"training diverges: the loss of step {update:,} is {mean_loss}; the update was not applied, and with "
                f"--deepspeed it cannot be skipped. Its rows, most likely cause first: {rows}"
            )

    def leaves_to(self, optimizer: Any, grad_norm: Tensor | float, update: int) -> bool:
        """Leave it to the optimizer to skip an update, if the host would have to wait for its norm; see `postpone`.

        Args:
            optimizer: torch's optimizer of this worker.
            grad_norm: norm of the gradient over all workers.
            update: number of the update, counted from 1.

        Returns:
            False if `should_skip` must decide.
        """
        if not isinstance(grad_norm, Tensor) or not runs_behind_host(grad_norm.device):
            return False
        if not skip_step_where(optimizer, 1 - grad_norm.detach().isfinite().float()):
            return False
        self.postpone(grad_norm, update)
        return True

    def postpone(self, grad_norm: Tensor, update: int) -> None:
        """Record an update that the optimizer leaves out by itself if it is not finite; `resolve` follows.

        Args:
            grad_norm: norm of the gradient over all workers, scalar.
            update: number of the update, counted from 1.
        """
        steps, self._steps = self._steps, []
        self._postponed = PostponedUpdate(update, HostCopy(grad_norm), steps)

    def resolve(self, finite_rows: FiniteRows) -> None:
        """Read the norm of the postponed update, if there is one. Collective if it is not finite.

        The weights must still be those after that update, at the next update at the latest.

        Args:
            finite_rows: finds the rows that cause it.

        Raises:
            UserError: as in `should_skip`.
        """
        postponed, self._postponed = self._postponed, None
        if postponed:
            self._judge(float(postponed.norm), postponed.number, postponed.steps, finite_rows, scaled=False)

    def should_skip(self, grad_norm: Tensor | float, update: int, finite_rows: FiniteRows, scaled: bool) -> bool:
        """Decide whether to skip an update. Collective if the gradient is not finite.

        Args:
            grad_norm: norm of the gradient over all workers.
            update: number of the update, counted from 1.
            finite_rows: finds the rows that cause it.
            scaled: the loss was scaled for half precision. An overflow of the gradient is then part of the search for
                the scale and not an error; the scaler skips that update by itself.

        Returns:
            True if the update must be skipped.

        Raises:
            UserError: on all workers, if this is the last of `limit` consecutive non-finite updates.
        """
        steps, self._steps = self._steps, []
        return self._judge(float(grad_norm), update, steps, finite_rows, scaled)

    def _judge(
        self,
        grad_norm: float,
        update: int,
        steps: Sequence[tuple[Tensor, Batch]],
        finite_rows: FiniteRows,
        scaled: bool,
    ) -> bool:
        """Return True if an update is not finite and must have no effect; see `should_skip`."""
        if math.isfinite(grad_norm):
            self.consecutive = 0
            return False
        loss, rows = self._find_rows(steps, finite_rows)
        if scaled and math.isfinite(loss):
            return False
        self.consecutive += 1
        cause = f"loss {loss}" if not math.isfinite(loss) else f"loss {loss:.4f}, gradient {grad_norm}"
        if self.consecutive < self.limit:
            self.log(f"step {update:,} is skipped ({cause}); its rows, most likely cause first: {rows}")
            return True
        raise UserError(
            f"training diverges: {self.consecutive} steps in a row had a loss or a gradient that is not finite "
            f"(--max_bad_steps), the last of them step {update:,} ({cause}). None of these updates was applied. Rows "
            f"of the last one, most likely cause first: {rows}"
        )

    def _find_rows(self, steps: Sequence[tuple[Tensor, Batch]], finite_rows: FiniteRows) -> tuple[float, str]:
        """Return the mean loss over all workers, and the rows of their steps as text. Collective."""
        loss = sum(float(loss) for loss, _ in steps) / max(1, len(steps))
        own: list[tuple[bool, bool, int, int]] = []  # row is finite, loss of its step is finite, file, offset
        for step_loss, batch in steps:
            finite = finite_rows(batch) or [True] * len(batch.rows)
            loss_is_finite = math.isfinite(step_loss)
            own += [(is_finite, loss_is_finite, *row) for is_finite, row in zip(finite, batch.rows, strict=True)]
        shares = [(loss, len(own), sorted(own)[:MAX_NAMED_ROWS])]
        if dist.is_initialized():
            shares *= dist.get_world_size()
            dist.all_gather_object(shares, shares[0])
        rows = sorted(row for _, _, part in shares for row in part)[:MAX_NAMED_ROWS]
        names = ", ".join(f"{self.files[file]}:byte {offset:,}" for _, _, file, offset in rows)
        more = sum(count for _, count, _ in shares) - len(rows)
        return sum(loss for loss, _, _ in shares) / len(shares), names + (f" and {more:,} more" if more else "")
