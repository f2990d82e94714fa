"""What a search draws from: words `NAME=DOMAIN`, each a flag and the values it may take.

    learning_rate=loguniform(1e-6,1e-4)     temperature=uniform(0.01,0.1)     train_group_size=randint(2,9)
    lr_scheduler_type=choice(linear,cosine)     query_instruction_for_retrieval=choice("","query: ")

| domain | values |
| --- | --- |
| `uniform(lo,hi)` | numbers from lo to hi, spread evenly |
| `loguniform(lo,hi)` | the same, their logarithms spread evenly |
| `quniform(lo,hi,q)` | multiples of q from lo to hi, hi included; lo and hi are multiples of q themselves |
| `randint(lo,hi)` | whole numbers from lo to hi - 1: hi is not drawn, as in Ray Tune and Python's range |
| `lograndint(lo,hi)` | the same, their logarithms spread evenly |
| `choice(a,b,...)` | one of the values, at random |
| `grid(a,b,...)` | every value, with every value of the other grids |

Spaces do not matter. A text with a comma, a parenthesis or a space at its end stands in double quotes, as in JSON.
Flags of one number, one text, or True and False can be searched; lists and JSON objects cannot.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from raybge.cli.parser import READERS, Flag
from raybge.util.errors import UserError

# What stands between the parentheses; None: any number of values.
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
LARGEST = 2**53  # whole numbers up to here are exact as floats too, which samplers and charts use

# Flags that exist and make no sense to search, by pattern of the whole name, each with the reason.
NOT_SEARCHED = {
    r"model_name_or_path|config_name|tokenizer_name|use_fast_tokenizer": (
        "all trials start from one model; search each model by itself"
    ),
    r".*_dir|.*_file|.*_path|resume_from_checkpoint|guide_model|cross_encoder": "it names a place, not a setting",
    r".*token|trackio_.*|run_name|project": "it names an account or a run, not a setting",
    r"num_workers|use_gpu.*|cpus_per_worker|max_failures|address|use_cpu|ddp_.*|fsdp|shard_size|shards_per_actor": (
        "what is learned does not depend on the machine"
    ),
    r"torch_.*|.*_checkpointing|sub_batch_size|score_block|pad_to_.*|((search|reranker)_)?batch_size|use_cache": (
        "it changes speed and memory, not the model"
    ),
    r"config|dry_run|verbose|overwrite.*|resume|do_.*|debug|full_determinism|score_only|keep_scores": (
        "it steers the run, not the model"
    ),
    r"log_.*|logging_.*|save_.*|report_to|skip_memory_metrics|include_num_.*": "it steers what a run writes down",
    r"eval_.*|per_device_eval_.*|metric_for_best_model|greater_is_better|load_best_model_at_end": (
        "trials are compared by what is measured, which must be the same for all"
    ),
    r"trust_remote_code|on_bad_rows": "it is a matter of trust, not of quality",
}

_NAME = re.compile(r"[^\s=(),\"]+")
_BARE = re.compile(r"[^,()\"]*")


@dataclass(frozen=True)
class Domain:
    """The values that one flag may take: a function of FUNCTIONS and what stands between its parentheses."""

    function: str
    arguments: tuple[Any, ...]

    @property
    def grid(self) -> bool:
        """Whether every value is tried, rather than some drawn."""
        return self.function == "grid"

    @property
    def categorical(self) -> bool:
        """Whether the values are listed, `arguments` being the list; else they are numbers from `lo` to `hi`."""
        return FUNCTIONS[self.function] is None

    @property
    def continuous(self) -> bool:
        """Whether any number between `lo` and `hi` may be drawn."""
        return self.function in ("uniform", "loguniform")

    @property
    def log(self) -> bool:
        """Whether the numbers are spread evenly over their logarithms."""
        return self.function in LOG

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return self.function in WHOLE

    @property
    def lo(self) -> float:
        return self.arguments[0]

    @property
    def hi(self) -> float:
        """The end of the interval, drawn itself by quniform alone."""
        return self.arguments[1]

    def __str__(self) -> str:
        return f"{self.function}({','.join(map(_written, self.arguments))})"

    def __contains__(self, value: object) -> bool:
        if self.categorical:
            # True is 1 to Python, and not to a flag.
            return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.arguments)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if self.whole:
            return value == int(value) and self.lo <= value < self.hi if math.isfinite(value) else False
        # The logarithm and the multiple of q round in the last digits.
        near = 1e-12 * max(abs(self.lo), abs(self.hi))
        if self.function == "quniform":
            q = self.arguments[2]
            return self.lo - near <= value <= self.hi + near and abs(value - round(value / q) * q) <= 1e-9 * q + near
        return self.lo - near <= value <= self.hi + near

    def to_ray(self) -> Any:
        """The same as ray.tune says it."""
        from ray import tune

        if self.categorical:
            return (tune.grid_search if self.grid else tune.choice)(list(self.arguments))
        return getattr(tune, self.function)(*self.arguments)


def parse(words: Iterable[str], flags: Mapping[str, Flag]) -> dict[str, Domain]:
    """The domains by flag that `words` describe; a word may hold several, with spaces between.

    Args:
        words: `NAME=DOMAIN`; the module says what a domain is. NAME may be an alias.
        flags: those of the command, as `raybge.cli.parser.declared` gives them.

    Raises UserError, with the text and a caret under the character that is wrong.
    """
    found: dict[str, Domain] = {}
    for word in words:
        reader = _Reader(word)
        while not reader.at_end():
            start = reader.position
            f = _flag(reader, flags)
            if f.name in found:
                reader.fail(start, f"{f.name} is searched twice")
            found[f.name] = _domain(reader, f)
    return found


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    """A piece of the text and where it begins."""

    text: str
    start: int


class _Reader:
    """A text that is read from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def fail(self, at: int, message: str) -> NoReturn:
        """Stop with a sentence, the text, and a caret under its character `at`."""
        shown = "".join(c if c.isprintable() else " " for c in self.text)
        # Chinese, Japanese and Korean characters take two columns of a terminal, and so must what stands below them.
        below = "".join("\u3000" if unicodedata.east_asian_width(c) in "WF" else " " for c in shown[:at])
        raise UserError(f"--search: {message}\n  {shown}\n  {below}^")

    def at_end(self) -> bool:
        """Whether nothing but spaces is left; skips them."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.position == len(self.text)

    def next_is(self, sign: str) -> bool:
        """Whether `sign` comes next; if so, goes past it."""
        if self.at_end() or self.text[self.position] != sign:
            return False
        self.position += 1
        return True

    def read(self, pattern: re.Pattern[str]) -> _Word:
        """What matches here, without spaces around it; may be empty."""
        self.at_end()
        start = self.position
        match = pattern.match(self.text, start)
        self.position = match.end() if match else start
        return _Word(self.text[start : self.position].rstrip(), start)

    def value(self) -> _Word:
        """A value: bare, or in double quotes."""
        if self.at_end() or self.text[self.position] != '"':
            return self.read(_BARE)
        start = self.position
        try:
            text, self.position = json.JSONDecoder(strict=False).raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            unclosed = error.msg.startswith("Unterminated")
            self.fail(
                start if unclosed else min(error.pos, len(self.text) - 1),
                "this quote is never closed" if unclosed else 'in quotes, write \\" for a quote and \\\\ for a \\',
            )
        return _Word(text, start)


# --- syntax -----------------------------------------------------------------------------------------------------------


def _flag(reader: _Reader, flags: Mapping[str, Flag]) -> Flag:
    """The flag in front of the `=`."""
    name = reader.read(_NAME)
    if not name.text:
        reader.fail(
            name.start, "a flag's name is missing here: write NAME=DOMAIN, such as temperature=uniform(0.01,0.1)"
        )
    names = {spelling: f for f in flags.values() for spelling in (f.name, *f.aliases)}
    if name.text not in names:
        reader.fail(name.start, f"there is no flag {name.text}{_near(name.text, names)}")
    f = names[name.text]
    if reason := _not_searched(f):
        reader.fail(name.start, f"{f.name} cannot be searched: {reason}")
    if not reader.next_is("="):
        reader.fail(reader.position, f"expected = and a domain after {name.text}")
    return f


def _not_searched(f: Flag) -> str | None:
    """Why a flag cannot be searched; None if it can."""
    if f.refused or f.unbuilt:
        return f.refused or "it is not built yet"
    for pattern, reason in NOT_SEARCHED.items():
        if re.fullmatch(pattern, f.name):
            return reason
    if f.many or f.kind == "json":
        return f"it takes {'a list' if f.many else 'a JSON object'}"
    return None


def _domain(reader: _Reader, f: Flag) -> Domain:
    """The function and its arguments after the `=`."""
    function = reader.read(_NAME)
    if not function.text:
        reader.fail(function.start, f"expected a domain such as {_fitting(f)}")
    called = reader.next_is("(")
    if function.text not in FUNCTIONS:
        instead = "" if called else f"; one fixed value is given by --{f.name} itself"
        reader.fail(function.start, f"there is no domain {function.text}{_near(function.text, FUNCTIONS) or instead}")
    if not called:
        reader.fail(reader.position, f"expected ( after {function.text}")
    opened = reader.position - 1
    values: list[_Word] = []
    while not values or reader.next_is(","):
        values.append(reader.value())
    if reader.at_end():
        reader.fail(opened, "this parenthesis is never closed")
    closed = reader.position
    if not reader.next_is(")"):
        reader.fail(closed, f"expected a comma or ) here, found {reader.text[closed]}")
    if not reader.at_end() and reader.text[reader.position] in "(),":
        reader.fail(reader.position, f"the domain of {f.name} ends before this; a space comes between flags")
    parameters = FUNCTIONS[function.text]
    if parameters is None:
        arguments = _values(reader, f, function.text, values, closed)
    else:
        if f.kind not in ("int", "float") or (f.kind == "int" and function.text not in WHOLE):
            draws = "whole numbers" if function.text in WHOLE else "fractions"
            reader.fail(
                function.start, f"{function.text} draws {draws}, and {f.name} takes {_kind(f)}: use {_fitting(f)}"
            )
        _count(reader, function.text, parameters, values, closed)
        arguments = _interval(reader, function.text, values)
    return Domain(function.text, arguments)


def _count(reader: _Reader, function: str, parameters: Sequence[str], values: Sequence[_Word], closed: int) -> None:
    given = [] if len(values) == 1 and not values[0].text else values
    if len(given) != len(parameters):
        at = given[len(parameters)].start if len(given) > len(parameters) else closed
        how = ",".join(parameters)
        reader.fail(at, f"{function}({how}) takes {len(parameters)} numbers, found {len(given)}")


def _interval(reader: _Reader, function: str, values: Sequence[_Word]) -> tuple[float, ...]:
    """The numbers of an interval, checked."""
    numbers = tuple(_number(reader, word, function in WHOLE) for word in values)
    lo, hi = numbers[:2]
    if function in LOG and lo <= 0:
        reader.fail(values[0].start, f"{function} takes numbers above 0: {values[0].text} has no logarithm")
    if lo >= hi:
        reader.fail(values[0].start, f"the interval is empty: {values[0].text} is not below {values[1].text}")
    if function == "quniform":
        q = numbers[2]
        if q <= 0:
            reader.fail(values[2].start, f"q must be above 0, found {values[2].text}")
        for word, bound in zip(values[:2], (lo, hi), strict=True):
            if not math.isclose(bound / q, round(bound / q)):
                reader.fail(word.start, f"{word.text} is not a multiple of q, which is {values[2].text}")
    return numbers


def _values(reader: _Reader, f: Flag, function: str, words: Sequence[_Word], closed: int) -> tuple[Any, ...]:
    """The values of a choice or grid, as the flag's kind."""
    if len(words) == 1 and words[0].start == closed:
        reader.fail(closed, f"{function} needs at least one value")
    values: list[Any] = []
    for word in words:
        value = _value(reader, f, word)
        if value in values:
            reader.fail(word.start, f"{word.text or 'the empty text'} is there twice")
        values.append(value)
    return tuple(values)


def _value(reader: _Reader, f: Flag, word: _Word) -> Any:
    if not word.text and reader.text[word.start] != '"':
        reader.fail(word.start, 'a value is missing here; the empty text is written ""')
    if f.kind in ("int", "float"):
        return _number(reader, word, f.kind == "int")
    if f.choices and word.text not in f.choices:
        one_of = ", ".join(f.choices)
        reader.fail(word.start, f"{f.name} takes one of {one_of}, found {word.text}{_near(word.text, f.choices)}")
    try:
        return READERS[f.kind](word.text)
    except argparse.ArgumentTypeError:
        reader.fail(word.start, f"{f.name} takes {_kind(f)}, found {word.text}")


def _number(reader: _Reader, word: _Word, whole: bool) -> float:
    try:
        value = int(word.text) if whole else float(word.text)
    except ValueError:
        expected = "a whole number" if whole else "a number"
        reader.fail(word.start, f"expected {expected}, found {word.text or 'nothing'}")
    if not abs(value) <= (LARGEST if whole else 1e300):
        reader.fail(word.start, f"{word.text} is no number that a flag can take")
    return value


# --- words ------------------------------------------------------------------------------------------------------------


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _kind(f: Flag) -> str:
    return {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "a text"}[f.kind]


def _fitting(f: Flag) -> str:
    """A domain that a flag of this kind can have."""
    return {
        "bool": "choice(True,False)",
        "int": "randint(lo,hi)",
        "float": "uniform(lo,hi)",
        "str": f"choice({','.join(f.choices[:2])})" if f.choices else "choice(a,b)",
    }[f.kind]


def _written(value: Any) -> str:
    """A value as it is written between the parentheses."""
    if isinstance(value, str):
        bare = value and value == value.strip() and value.isprintable() and _BARE.fullmatch(value)
        return value if bare else json.dumps(value, ensure_ascii=False)
    # repr is exact, and longer than needed: 1e-06, 2.0.
    return re.sub(r"e-0(?=\d)", "e-", repr(value)).removesuffix(".0")
