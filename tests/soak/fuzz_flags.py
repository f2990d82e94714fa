"""Command lines, config files, ranges and search spaces: parsed correctly, or refused by the flag's name."""

import contextlib
import io
import json
import math
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import yaml
from hypothesis import assume, given
from inputs import share, tried

from raybge.cli.flag import MISSING, Flag
from raybge.cli.options import EncodeOptions, EvaluateOptions, MergeOptions, MineOptions, TrainOptions
from raybge.cli.parser import build_options, declared_flags, parse_options
from raybge.cluster.resources import parse_num_workers
from raybge.mining.spec import parse_rank_range
from raybge.training.spec import BatchSpec, DataSpec, RunSpec, TrainerSpec
from raybge.tuning import search_space as space
from raybge.tuning.search_space_parser import parse_search_space
from raybge.util.errors import UserError

FOLDER = tempfile.TemporaryDirectory(prefix="raybge-soak-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
COMMANDS = (MineOptions, TrainOptions, EvaluateOptions, MergeOptions, EncodeOptions)
FLAGS = {command: declared_flags(command) for command in COMMANDS}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
WORDS = "- -- -1 1 0 1.5 1e3 nan inf -inf 1_0 ١ True false yes None {} [1] / a/b 2-8 8-2 = x=y".split()
WORDS += ["", " ", "9" * 5000, "9" * 20, '{"a": 1}', "{" * 9, '{"a":' * 5000, "\0"]
odd = st.sampled_from(WORDS)
words = st.one_of(odd, texts)


def meant(f: Flag, word: str) -> tuple[bool, object]:
    """Return (True if the word is a value of the flag, the value)."""
    if f.kind == "bool":
        lower = word.lower()
        return lower in ("true", "false", "1", "0", "yes", "no"), lower in ("true", "1", "yes")
    if f.kind in ("int", "float"):
        try:
            value = int(word) if f.kind == "int" else float(word)
        except ValueError:
            return False, None
        return not (isinstance(value, float) and math.isnan(value)), value
    if f.kind == "json":
        try:
            value = json.loads(word) if word.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            value = None
        return isinstance(value, dict), value
    return f.choices is None or word in f.choices, word


def required(command: type) -> dict:
    required_fields = [f for f in FLAGS[command].values() if f.default is MISSING]
    options = {f.name: f.choices[0] if f.choices else "x" for f in required_fields}
    return {name: [value] if FLAGS[command][name].many else value for name, value in options.items()}


def as_words(values: dict) -> list[str]:
    return [w for name, v in values.items() for w in (f"--{name}", *(v if isinstance(v, list) else [str(v)]))]


@share(10)
@given(data=st.data(), command=st.sampled_from(COMMANDS), equals=st.booleans())
def test_a_flag_with_any_word(data, command, equals):
    """A flag on the command line equals the argument in Python."""
    f = FLAGS[command][data.draw(st.sampled_from([*FLAGS[command]]))]
    assume(f.name not in ("config", "output_dir") and not f.refused and not f.no_effect)
    good = {"int": "3", "float": "0.5", "bool": "no", "json": '{"b": 2}', "str": f.choices[-1] if f.choices else "t"}
    word = data.draw(st.one_of(words, st.just(good[f.kind])))
    assume(equals or not word.startswith("-"))  # otherwise it is parsed as a flag
    assume(word != "--")  # which argparse removes
    with tried("a flag with any word"):
        right, value = meant(f, word)
        others = {name: v for name, v in required(command).items() if name != f.name}
        argv = [*as_words(others), *([f"--{f.name}={word}"] if equals else [f"--{f.name}", word])]
        for in_python in (False, True):
            try:
                result = (
                    build_options(command, {**others, f.name: word}) if in_python else parse_options(command, argv, "p")
                )
            except UserError as error:
                assert not right, error
                assert f"--{f.name}" in str(error)
            else:
                assert right
                seen = {**vars(result), **getattr(result, "training", {})}[f.name]
                assert seen == ([value] if f.many else value) and type(seen) is type([value] if f.many else value)


@share(6)
@given(data=st.data(), command=st.sampled_from(COMMANDS))
def test_any_words(data, command):
    names = st.sampled_from(
        [f"--{name}" for name in FLAGS[command]] + ["--help", "--help-all", "-h", "--", "--x", "-x"]
    )
    argv = data.draw(st.lists(st.one_of(names, words), max_size=6))
    if data.draw(st.booleans()):
        argv += as_words(required(command))
    with tried("command lines"), contextlib.redirect_stdout(io.StringIO()):
        try:
            result = parse_options(command, argv, "p")
        except UserError as error:
            assert str(error)
        except SystemExit as ended:
            assert ended.code == 0 and {"--help", "--help-all", "-h"} & set(argv)
        else:
            assert isinstance(result, command)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.dates(), st.binary(max_size=3), odd),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
YAML = ["&a [*a]", "a: *b", "{", "- x", "a: 2020-99-99", "a: !!int x", "? [1]\n: 2", "a: 0x", "a: 1e400", "[" * 99]
YAML += ["a: 99999999999999-01-01", "a: !!timestamp x", "<<: 1", "\x00", "\ufeffa: 1", "a: 12:99", "a: !!float x"]
YAML += ["a: !!python/object/apply:os.system [x]"]


@share(6)
@given(data=st.data(), command=st.sampled_from(COMMANDS))
def test_files_of_flags(data, command):
    """Flags in YAML are checked like those of the command line, then by the training."""
    options = data.draw(st.dictionaries(st.one_of(st.sampled_from([*FLAGS[command]]), texts), plain, max_size=3))
    options.pop("config", None)
    text = data.draw(st.one_of(st.just(yaml.safe_dump({**required(command), **options})), st.sampled_from(YAML), texts))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1"]))
    path = Path(FOLDER.name) / "run.yaml"
    path.write_bytes(text.encode(encoding, "replace"))
    with tried("files of flags"):
        try:
            result = parse_options(command, ["--config", str(path)], "p")
            if command is TrainOptions:
                for spec in (RunSpec, DataSpec, BatchSpec, TrainerSpec):
                    spec.from_options(result)
        except UserError as error:
            assert str(error)
        else:
            assert isinstance(result, command)


# --- ranges and numbers -----------------------------------------------------------------------------------------------

figures = st.one_of(
    st.integers(0, 300).map(str), st.sampled_from(["", "-1", "9" * 5000, "١", "1_0", "1.0", " 1", "0x1"])
)
ranges = st.one_of(st.builds("{}-{}".format, figures, figures), st.builds("{} - {}".format, figures, figures), words)


@share(3)
@given(text=ranges)
def test_range_for_sampling(text):
    with tried("--range_for_sampling"):
        low, _, high = text.strip().partition("-")
        plain = all(part and set(part) <= set("0123456789") and len(part) < 4000 for part in (low, high))
        right = plain and int(low) < int(high) < 2**62
        try:
            result = parse_rank_range(text)
        except UserError as error:
            assert not right and "--range_for_sampling" in str(error)
        else:
            assert right and result == (int(low), int(high))


@share(2)
@given(text=st.one_of(figures, ranges), elastic=st.booleans())
def test_num_workers(text, elastic):
    with tried("--num_workers"):
        low, mark, high = text.partition("-")
        plain = all(part and set(part) <= set("0123456789") and len(part) < 10 for part in (low, high or low))
        right = plain and bool(mark) == bool(high) and 1 <= int(low) <= int(high or low)
        try:
            result = parse_num_workers(text, elastic)
        except UserError as error:
            assert "--num_workers" in str(error)
            assert not right or (not elastic and int(low) < int(high))
        else:
            assert right and result == (int(low), int(high or low)) and (elastic or result[0] == result[1])


names = st.sampled_from(
    "learning_rate temperature train_group_size lr_scheduler_type normalize_embeddings seed output_dir x".split()
)
functions = st.sampled_from([*space.FUNCTIONS, "normal", ""])
items = st.one_of(
    st.floats().map(repr), st.integers(-9, 99).map(str), st.text(max_size=3).map(json.dumps), words, st.just("linear")
)
domains = st.builds(
    lambda name, function, values, mark, end: f"{name}={function}({mark.join(values)}{end}",
    names,
    functions,
    st.lists(items, max_size=4),
    st.sampled_from([",", " , ", ";"]),
    st.sampled_from([")", ")", ")", "", "))"]),
)


@share(6)
@given(text=st.one_of(domains, domains.map(lambda d: d + " " + d.replace("learning", "")), words))
def test_search_spaces(text):
    """An accepted search space survives writing and reading, and has only values of the flag."""
    flags = FLAGS[TrainOptions]
    with tried("search spaces"):
        try:
            result = parse_search_space([text], flags)
        except UserError as error:
            assert str(error).startswith("--search: ") and str(error).splitlines()[-1].strip("　 ") == "^"
        else:
            again = parse_search_space([f"{name}={domain}" for name, domain in result.items()], flags)
            assert again == result
            for name, domain in result.items():
                for value in domain.arguments:
                    build_options(TrainOptions, {**required(TrainOptions), name: value})
                    assert not isinstance(value, float) or math.isfinite(value)
