"""Search space: the domain of each searched flag, written as `NAME=DOMAIN`.

    learning_rate=loguniform(1e-6,1e-4)     temperature=uniform(0.01,0.1)     train_group_size=randint(2,9)
    lr_scheduler_type=choice(linear,cosine)     query_instruction_for_retrieval=choice("","query: ")

| domain | values |
| --- | --- |
| `uniform(lo,hi)` | real numbers from lo to hi, uniformly distributed |
| `loguniform(lo,hi)` | the same with uniformly distributed logarithms |
| `quniform(lo,hi,q)` | multiples of q from lo to hi, hi included; lo and hi are multiples of q themselves |
| `randint(lo,hi)` | whole numbers from lo to hi - 1: hi is excluded, as in Ray Tune and Python's range |
| `lograndint(lo,hi)` | the same with uniformly distributed logarithms |
| `choice(a,b,...)` | one of the values at random |
| `grid(a,b,...)` | every value, combined with every value of the other grids |

Spaces have no meaning. A text with a comma, with a parenthesis, or with a space at its start or end is written in
double quotes, as in JSON. Flags with one number, one text, or True and False can be searched; lists and JSON objects
cannot. `search_space_parser.py` reads this syntax.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

# Parameters of each function; None: any number of values.
MINING_PREFIX = "mine."  # of searched mining flags whose names are training's as well
FUNCTIONS: dict[str, tuple[str, ...] | None] = {
    "uniform": ("lo", "hi"),
    "loguniform": ("lo", "hi"),
    "quniform": ("lo", "hi", "q"),
    "randint": ("lo", "hi"),
    "lograndint": ("lo", "hi"),
    "choice": None,
    "grid": None,
}
LOG = ("loguniform", "lograndint")
WHOLE = ("randint", "lograndint")

# A value that needs no quotes.
UNQUOTED = re.compile(r"[^,()\"]*")


@dataclass(frozen=True)
class Domain:
    """Values that one flag may take: a function of FUNCTIONS with its arguments."""

    function: str
    arguments: tuple[Any, ...]

    @property
    def grid(self) -> bool:
        """Return whether every value is tried, instead of a random sample."""
        return self.function == "grid"

    @property
    def categorical(self) -> bool:
        """Return whether the values are the list `arguments`, instead of numbers from `lo` to `hi`."""
        return FUNCTIONS[self.function] is None

    @property
    def continuous(self) -> bool:
        """Return whether any number between `lo` and `hi` may be sampled."""
        return self.function in ("uniform", "loguniform")

    @property
    def log(self) -> bool:
        """Return whether the logarithms are uniformly distributed."""
        return self.function in LOG

    @property
    def whole(self) -> bool:
        """Return whether only whole numbers are sampled."""
        return self.function in WHOLE

    @property
    def lo(self) -> float:
        """Lower end of the interval, included."""
        return self.arguments[0]

    @property
    def hi(self) -> float:
        """Upper end of the interval; only quniform samples it."""
        return self.arguments[1]

    def __str__(self) -> str:
        return f"{self.function}({','.join(map(_format_value, self.arguments))})"

    def __contains__(self, value: object) -> bool:
        if self.categorical:
            # True equals 1 in Python, but not as a value of a flag.
            return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.arguments)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if self.whole:
            return value == int(value) and self.lo <= value < self.hi if math.isfinite(value) else False
        # Logarithms and multiples of q are rounded in their last digits.
        tolerance = 1e-12 * max(abs(self.lo), abs(self.hi))
        inside = self.lo - tolerance <= value <= self.hi + tolerance
        if self.function == "quniform":
            q = self.arguments[2]
            return inside and abs(value - round(value / q) * q) <= 1e-9 * q + tolerance
        return inside

    def to_ray(self) -> Any:
        """Return the equivalent domain of ray.tune."""
        from ray import tune

        if self.categorical:
            return (tune.grid_search if self.grid else tune.choice)(list(self.arguments))
        return getattr(tune, self.function)(*self.arguments)


def _format_value(value: Any) -> str:
    """Return a value as it is written between the parentheses."""
    if isinstance(value, str):
        unquoted = value and value == value.strip() and value.isprintable() and UNQUOTED.fullmatch(value)
        return value if unquoted else json.dumps(value, ensure_ascii=False)
    # repr is exact, but longer than necessary: 1e-06, 2.0.
    return re.sub(r"e-0(?=\d)", "e-", repr(value)).removesuffix(".0")
