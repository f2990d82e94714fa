"""Parser of the search space syntax; a mistake is reported with a caret below the wrong character."""

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

from raybge.cli.flag import READERS, Flag
from raybge.cli.parser import closest_flag
from raybge.tuning.search_space import FUNCTIONS, LOG, MINING_PREFIX, UNQUOTED, WHOLE, Domain
from raybge.util.errors import UserError

LARGEST = 2**53  # whole numbers up to here are exact as floats, which samplers and charts use

# Flags that exist but are not searched, by pattern of the whole name, each with the reason.
NOT_SEARCHED = {
    r"model_name_or_path|config_name|tokenizer_name|use_fast_tokenizer": (
        "all trials start from the same model; run one search per model"
    ),
    r".*_dir|.*_file|.*_path|resume_from_checkpoint|guide_model|cross_encoder|batch_vectors": (
        "it is a path, not a setting"
    ),
    r".*token|trackio_.*|run_name|project": "it identifies an account or a run, and is not a setting",
    r"num_workers|use_gpu.*|cpus_per_worker|max_failures|address|use_cpu|ddp_.*|fsdp|shard_size|shards_per_actor": (
        "training results do not depend on the machine"
    ),
    r"torch_.*|.*_checkpointing|sub_batch_.*|score_block|pad_to_.*|((search|reranker)_)?batch_size|use_cache": (
        "it changes speed and memory, not the model"
    ),
    r"config|dry_run|verbose|overwrite.*|resume|do_.*|debug|full_determinism|score_only|keep_scores": (
        "it controls the run, not the model"
    ),
    r"log_.*|logging_.*|save_.*|report_to|skip_memory_metrics|include_num_.*": "it controls what a run records",
    r"eval_.*|per_device_eval_.*|metric_for_best_model|greater_is_better|load_best_model_at_end": (
        "trials are compared by their evaluation, which must be the same for all"
    ),
    r"ema|average_checkpoints|keep_better": "trials are compared by their last weights",
    r"trust_remote_code|on_bad_rows|accept_any_text": "it is a decision about safety, not about quality",
}

_NAME = re.compile(r"[^\s=(),\"]+")


def parse_search_space(texts: Iterable[str], flags: Mapping[str, Flag]) -> dict[str, Domain]:
    """Parse the domains of the searched flags.

    Args:
        texts: one or more `NAME=DOMAIN` each, separated by spaces; see `search_space`. NAME may be an alias.
        flags: flags of the command by name, as `raybge.cli.parser.declared_flags` returns them.

    Returns:
        Domains by canonical flag name, in the order of the texts.

    Raises:
        UserError: a syntax error, with the text and a caret below the wrong character; or a flag that is unknown or
            cannot be searched.
    """
    space: dict[str, Domain] = {}
    for text in texts:
        reader = _Reader(text)
        while not reader.at_end():
            start = reader.position
            f = _read_flag(reader, flags)
            if f.name in space:
                reader.fail(start, f"{f.name} is searched twice")
            space[f.name] = _read_domain(reader, f)
    return space


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Token:
    """Part of the text and the position of its first character."""

    text: str
    start: int


class _Reader:
    """Reader of a text from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def fail(self, at: int, message: str) -> NoReturn:
        """Raise UserError with the message, the text, and a caret below the character at position `at`."""
        printable = "".join(c if c.isprintable() else " " for c in self.text)
        # Chinese, Japanese and Korean characters are two columns wide in a terminal: the padding below must be, too.
        padding = "".join("\u3000" if unicodedata.east_asian_width(c) in "WF" else " " for c in printable[:at])
        raise UserError(f"--search: {message}\n  {printable}\n  {padding}^")

    def at_end(self) -> bool:
        """Skip spaces and return whether the text ends after them."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.position == len(self.text)

    def next_is(self, sign: str) -> bool:
        """Return whether `sign` is next, and skip it in that case."""
        if self.at_end() or self.text[self.position] != sign:
            return False
        self.position += 1
        return True

    def read(self, pattern: re.Pattern[str]) -> _Token:
        """Read what matches the pattern here, without surrounding spaces; it may be empty."""
        self.at_end()
        start = self.position
        match = pattern.match(self.text, start)
        self.position = match.end() if match else start
        return _Token(self.text[start : self.position].rstrip(), start)

    def value(self) -> _Token:
        """Read a value, unquoted or in double quotes."""
        if self.at_end() or self.text[self.position] != '"':
            return self.read(UNQUOTED)
        start = self.position
        try:
            text, self.position = json.JSONDecoder(strict=False).raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated")
            self.fail(
                start if unterminated else min(error.pos, len(self.text) - 1),
                "this quote is never closed" if unterminated else 'in quotes, write \\" for a quote and \\\\ for a \\',
            )
        return _Token(text, start)


# --- syntax -----------------------------------------------------------------------------------------------------------


def _read_flag(reader: _Reader, flags: Mapping[str, Flag]) -> Flag:
    """Read a flag name and the `=` after it."""
    name = reader.read(_NAME)
    if not name.text:
        reader.fail(name.start, "expected a flag name: write NAME=DOMAIN, such as temperature=uniform(0.01,0.1)")
    names = {spelling: f for f in flags.values() for spelling in f.spellings}
    if name.text not in names:
        reader.fail(name.start, f"there is no flag {name.text}{_did_you_mean(closest_flag(name.text, flags))}")
    f = names[name.text]
    if reason := _reason_not_searched(f):
        reader.fail(name.start, f"{f.name} cannot be searched: {reason}")
    if not reader.next_is("="):
        reader.fail(reader.position, f"expected = and a domain after {name.text}")
    return f


def _reason_not_searched(f: Flag) -> str | None:
    """Return the reason why a flag cannot be searched; None if it can."""
    if reason := f.refused or f.no_effect:
        return reason
    for pattern, reason in NOT_SEARCHED.items():
        if re.fullmatch(pattern, f.name.removeprefix(MINING_PREFIX)):
            return reason
    if f.many or f.kind == "json":
        return f"it takes {'a list' if f.many else 'a JSON object'}"
    return None


def _read_domain(reader: _Reader, f: Flag) -> Domain:
    """Read the function and its arguments after the `=`."""
    function = reader.read(_NAME)
    if not function.text:
        reader.fail(function.start, f"expected a domain such as {_example_domain(f)}")
    called = reader.next_is("(")
    if function.text not in FUNCTIONS:
        instead = "" if called else f"; for one fixed value, use --{f.name} itself"
        reader.fail(
            function.start, f"there is no domain {function.text}{_suggestion(function.text, FUNCTIONS) or instead}"
        )
    if not called:
        reader.fail(reader.position, f"expected ( after {function.text}")
    opened = reader.position - 1
    values: list[_Token] = []
    while not values or reader.next_is(","):
        values.append(reader.value())
    if reader.at_end():
        reader.fail(opened, "this parenthesis is never closed")
    closed = reader.position
    if not reader.next_is(")"):
        reader.fail(closed, f"expected a comma or ) here, found {reader.text[closed]}")
    if not reader.at_end() and reader.text[reader.position] in "(),":
        reader.fail(reader.position, f"the domain of {f.name} ends here; separate flags with a space")
    parameters = FUNCTIONS[function.text]
    if parameters is None:
        arguments = _read_choices(reader, f, function.text, values, closed)
    else:
        if f.kind not in ("int", "float") or (f.kind == "int" and function.text not in WHOLE):
            samples = "whole numbers" if function.text in WHOLE else "real numbers"
            message = f"{function.text} samples {samples}, but {f.name} takes {_kind(f)}: use {_example_domain(f)}"
            reader.fail(function.start, message)
        _check_count(reader, function.text, parameters, values, closed)
        arguments = _read_interval(reader, function.text, values)
    return Domain(function.text, arguments)


def _check_count(
    reader: _Reader, function: str, parameters: Sequence[str], values: Sequence[_Token], closed: int
) -> None:
    numbers = [] if len(values) == 1 and not values[0].text else values
    if len(numbers) != len(parameters):
        at = numbers[len(parameters)].start if len(numbers) > len(parameters) else closed
        signature = f"{function}({','.join(parameters)})"
        reader.fail(at, f"{signature} takes {len(parameters)} numbers, found {len(numbers)}")


def _read_interval(reader: _Reader, function: str, values: Sequence[_Token]) -> tuple[float, ...]:
    """Return the numbers of an interval."""
    numbers = tuple(_number(reader, token, function in WHOLE) for token in values)
    lo, hi = numbers[:2]
    if function in LOG and lo <= 0:
        reader.fail(values[0].start, f"{function} takes numbers above 0: {values[0].text} has no logarithm")
    if lo >= hi:
        reader.fail(values[0].start, f"the interval is empty: {values[0].text} is not below {values[1].text}")
    if function == "quniform":
        q = numbers[2]
        if q <= 0:
            reader.fail(values[2].start, f"q must be above 0, found {values[2].text}")
        for token, bound in zip(values[:2], (lo, hi), strict=True):
            if not math.isclose(bound / q, round(bound / q)):
                reader.fail(token.start, f"{token.text} is not a multiple of q, which is {values[2].text}")
    return numbers


def _read_choices(reader: _Reader, f: Flag, function: str, tokens: Sequence[_Token], closed: int) -> tuple[Any, ...]:
    """Return the values of a choice or a grid, converted to the flag's kind."""
    if len(tokens) == 1 and tokens[0].start == closed:
        reader.fail(closed, f"{function} requires at least one value")
    values: list[Any] = []
    for token in tokens:
        value = _value(reader, f, token)
        if value in values:
            reader.fail(token.start, f"{token.text or 'the empty text'} is a duplicate value")
        values.append(value)
    return tuple(values)


def _value(reader: _Reader, f: Flag, token: _Token) -> Any:
    if not token.text and reader.text[token.start] != '"':
        reader.fail(token.start, 'expected a value; the empty text is written ""')
    if f.kind in ("int", "float"):
        return _number(reader, token, f.kind == "int")
    if f.choices and token.text not in f.choices:
        one_of = ", ".join(f.choices)
        reader.fail(
            token.start, f"{f.name} takes one of {one_of}, found {token.text}{_suggestion(token.text, f.choices)}"
        )
    try:
        return READERS[f.kind](token.text)
    except argparse.ArgumentTypeError:
        reader.fail(token.start, f"{f.name} takes {_kind(f)}, found {token.text}")


def _number(reader: _Reader, token: _Token, whole: bool) -> float:
    try:
        value = int(token.text) if whole else float(token.text)
    except ValueError:
        expected = "a whole number" if whole else "a number"
        reader.fail(token.start, f"expected {expected}, found {token.text or 'nothing'}")
    if not abs(value) <= (LARGEST if whole else 1e300):
        reader.fail(token.start, f"{token.text} is not a number in the accepted range")
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


def _suggestion(text: str, known: Iterable[str]) -> str:
    return _did_you_mean(next(iter(difflib.get_close_matches(text, list(known), n=1)), None))


def _did_you_mean(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""


def _kind(f: Flag) -> str:
    return {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "a text"}[f.kind]


def _example_domain(f: Flag) -> str:
    """Return a domain that is valid for a flag of this kind."""
    return {
        "bool": "choice(True,False)",
        "int": "randint(lo,hi)",
        "float": "uniform(lo,hi)",
        "str": f"choice({','.join(f.choices[:2])})" if f.choices else "choice(a,b)",
    }[f.kind]
