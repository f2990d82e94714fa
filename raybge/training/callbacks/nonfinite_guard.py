"""Updates whose loss or gradient is not finite: left out, and the end of the run when they do not cease.

Data-parallel training sums gradients over workers: a number that is not finite in one worker's is then in everyone's,
and all decide alike without asking each other. They talk only once something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from raybge.data.stream import Batch
from raybge.util.errors import UserError

NAMED = 5  # rows of a message

# Of a step's batch: whether each row is sound, as far as the model can tell; None where it cannot.
Sound = Callable[[Batch], Sequence[bool] | None]


class BadSteps:
    """Watches the updates of one worker's training.

    Args:
        limit: bad updates in a row that end the run.
        files: names of the data's files, in the order of their numbers.
        say: shows a line to the person.
    """

    def __init__(self, limit: int, files: Sequence[str], say: Callable[[str], None]):
        self.limit = limit
        self.files = files
        self.say = say
        self.in_a_row = 0
        self._steps: list[tuple[Tensor, Batch]] = []  # of the update that is under way

    def step(self, loss: Tensor, batch: Batch) -> Tensor:
        """Take note of one step. The loss that comes back has a gradient that is finite only where the loss is."""
        self._steps.append((loss.detach(), batch))
        return loss * (1 + 0 * loss.detach())

    def check(self, number: int, sound: Sound) -> None:
        """Before a backward pass that makes the update too, as DeepSpeed's does. Collective.

        Raises:
            UserError: on all workers, when a worker's loss of update `number` is not finite: it could not be left out.
        """
        ((loss, batch),), self._steps = self._steps, []
        bad = 1 - loss.isfinite().float()
        if dist.is_initialized():
            dist.all_reduce(bad)
        if bad:
            total, rows = self._look([(loss, batch)], sound)
            raise UserError(
                f"training diverges: the loss of step {number:,} is {total}; no update was made of it, and with "
                f"--deepspeed none can be left out. Its rows, the likeliest cause first: {rows}"
            )

    def end(self, norm: Tensor | float, number: int, sound: Sound, scaled: bool) -> bool:
        """Whether update `number`, whose gradient over all workers has this norm, is to be left out.

        Args:
            scaled: the loss was scaled for half precision. A gradient that overflows then is how the scale is found,
                and no bad step; the scaler leaves it out by itself.

        Raises:
            UserError: on all workers, when it is one too many in a row.
        """
        steps, self._steps = self._steps, []
        if math.isfinite(norm):
            self.in_a_row = 0
            return False
        loss, rows = self._look(steps, sound)
        if scaled and math.isfinite(loss):
            return False
        self.in_a_row += 1
        cause = f"loss {loss}" if not math.isfinite(loss) else f"loss {loss:.4f}, gradient {float(norm)}"
        if self.in_a_row < self.limit:
            self.say(f"step {number:,} is left out ({cause}); its rows, the likeliest cause first: {rows}")
            return True
        raise UserError(
            f"training diverges: {self.in_a_row} steps in a row had a loss or a gradient that is not finite "
            f"(--max_bad_steps), the last of them step {number:,} ({cause}). No update was made of them. The last "
            f"one's rows, the likeliest cause first: {rows}"
        )

    def _look(self, steps: Sequence[tuple[Tensor, Batch]], sound: Sound) -> tuple[float, str]:
        """The loss over all workers, and their rows as text. Collective."""
        loss = sum(float(loss) for loss, _ in steps) / max(1, len(steps))
        mine: list[tuple[bool, bool, int, int]] = []  # whether the row, and its step, are sound; file and offset
        for step_loss, batch in steps:
            goods = sound(batch) or [True] * len(batch.rows)
            finite = math.isfinite(step_loss)
            mine += [(good, finite, *row) for good, row in zip(goods, batch.rows, strict=True)]
        shares = [(loss, len(mine), sorted(mine)[:NAMED])]
        if dist.is_initialized():
            shares *= dist.get_world_size()
            dist.all_gather_object(shares, shares[0])
        rows = sorted(row for _, _, some in shares for row in some)[:NAMED]
        says = ", ".join(f"{self.files[file]}:byte {offset:,}" for _, _, file, offset in rows)
        more = sum(count for _, count, _ in shares) - len(rows)
        return sum(loss for loss, _, _ in shares) / len(shares), says + (f" and {more:,} more" if more else "")
