"""Build a checked object of flags from the command line, `--config run.yaml` or the arguments of a Python function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from raybge.cli.flag import Flag
from raybge.cli.help_page import argument_parser, print_and_exit
from raybge.cli.options.common import FLAGEMBEDDING
from raybge.cli.suggestions import flag_of_other_name, suggest_flag
from raybge.cli.training_arguments import training_argument_flags
from raybge.util.errors import UserError

T = TypeVar("T")


def parse_options(
    options_class: type[T],
    argv: Sequence[str],
    prog: str,
    report: Callable[[str], None] = lambda _: None,
    examples: str = "",
) -> T:
    """Parse a command line into an object of `options_class`.

    Args:
        options_class: dataclass whose fields are declared with `flag`.
        argv: words of the command line after the program's name.
        prog: program name in the help page.
        report: called with a line on each flag that is set and has no effect.
        examples: command lines that open the help page.

    Returns:
        The checked options; flags on the command line override those of --config.

    Raises:
        UserError: an unknown flag, a value of the wrong kind, or a missing required flag.
        SystemExit: with code 0 after --help or --help-all printed the help page.
    """
    flags = declared_flags(options_class)
    common = getattr(options_class, "common_flags", {})
    parser = argument_parser(options_class.__doc__, flags.values(), prog, "--help-all" in argv, examples, common)
    if {"-h", "--help", "--help-all"} & set(argv):
        print_and_exit(parser.format_help().rstrip("\n"))
    namespace, unknown = parser.parse_known_args(list(argv))
    for word in unknown:
        raise UserError(_unknown(word, flags) if word.startswith("--") else f"«{word}» belongs to no flag")
    values = vars(namespace)
    return build_options(options_class, {**read_config(values.get("config"), flags), **values}, report)


def build_options(
    options_class: type[T], values: Mapping[str, Any], report: Callable[[str], None] = lambda _: None
) -> T:
    """Build an object of `options_class` from values by name.

    Args:
        options_class: dataclass whose fields are declared with `flag`.
        values: values by flag name or alias; None stands for an unset flag.
        report: called with a line on each flag that is set and has no effect.

    Returns:
        The checked options.

    Raises:
        UserError: an unknown flag, a value of the wrong kind, a flag without effect here, or a missing required flag.
    """
    flags = declared_flags(options_class)
    by_spelling = {spelling: f for f in flags.values() for spelling in f.spellings}
    converted: dict[str, Any] = {}
    for spelling, value in values.items():
        if spelling not in by_spelling:
            raise UserError(_unknown(f"--{spelling}", flags))
        f = by_spelling[spelling]
        value = f.convert(value)
        if value is None:
            continue
        if f.refused and value != f.default:
            raise UserError(f"--{f.name} cannot be used: {f.refused}")
        if f.no_effect and value != f.default:
            report(f"--{f.name} has no effect: {f.no_effect}")
        elif f.group != FLAGEMBEDDING:
            converted[f.name] = value
    converted = {**preset_values(options_class, converted.get("preset")), **converted}
    missing = [f"--{f.name}" for f in flags.values() if f.required and f.name not in converted]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}")
    training = {f.name: converted.pop(f.name) for f in flags.values() if f.transformers and f.name in converted}
    return options_class(**converted, **({"training": training} if _takes_training(options_class) else {}))


def preset_values(options_class: type, preset: str | None) -> dict[str, Any]:
    """Return the values that a preset of `options_class.presets` gives to unset flags; none without a preset."""
    values: dict[str, Any] = getattr(options_class, "presets", {}).get(preset, {})
    return values


def declared_flags(options_class: type) -> dict[str, Flag]:
    """Return the flags of `options_class` by name, including TrainingArguments if the class takes them.

    The class's `other_flags`, if any, are those of FlagEmbedding that are refused or have no effect.
    """
    hints = get_type_hints(options_class)
    flags: dict[str, Flag] = {}
    for f in dataclasses.fields(options_class):
        if "group" in f.metadata:
            kind, many = _kind(hints[f.name])
            flags[f.name] = Flag(name=f.name, kind=kind, many=many, default=f.default, **f.metadata)
    if _takes_training(options_class):
        flags.update({name: f for name, f in training_argument_flags().items() if name not in flags})
    return flags | {f.name: f for f in getattr(options_class, "other_flags", ())}


def changed_values(options: Any) -> dict[str, Any]:
    """Return the values of `options` by flag name that differ from their defaults; tokens are left out."""
    values = {**vars(options), **getattr(options, "training", {})}
    return {
        name: values[name]
        for name, f in declared_flags(type(options)).items()
        if name in values and values[name] != f.default and not name.endswith("token")
    }


def read_config(path: str | None, flags: Mapping[str, Flag], option: str = "--config") -> dict[str, Any]:
    """Read a YAML file of flags.

    Args:
        path: the file; None for no file.
        flags: accepted flags by name.
        option: flag that errors name.

    Returns:
        Values by canonical flag name, so that an alias on the command line still overrides the file.

    Raises:
        UserError: the file cannot be read, is not a YAML mapping, or names an unknown flag.
    """
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        # PyYAML does not wrap all errors of its value constructors: 2020-99-99 raises a ValueError
        raise UserError(f"{option} {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: expected lines `flag: value`")
    names = {spelling: f.name for f in flags.values() for spelling in f.spellings}
    for name in content:
        if name not in names:
            raise UserError(f"{option} {path}: {_unknown(f'--{name}', flags)}")
    return {names[name]: value for name, value in content.items()}


def closest_flag(name: str, flags: Mapping[str, Flag]) -> str | None:
    """Return the spelling of the flag that a person meant by an unknown one; None if that is not clear."""
    return suggest_flag(name, flags, _words_of_all_flags())


def _takes_training(options_class: type) -> bool:
    return any(f.metadata.get("training_arguments") for f in dataclasses.fields(options_class))


def _kind(hint: Any) -> tuple[str, bool]:
    """Return the kind of a field's type, and whether it is a list of that kind."""
    if get_origin(hint) is not list:
        hint = next(each for each in (get_args(hint) or (hint,)) if each is not type(None))
    many = get_origin(hint) is list
    kind = get_args(hint)[0] if many else get_origin(hint) or hint
    return "json" if kind is dict else kind.__name__, many


def _unknown(word: str, flags: Mapping[str, Flag]) -> str:
    name = word[2:].split("=")[0]
    similar = closest_flag(name, flags) or flag_of_other_name(name, flags)
    return f"there is no flag --{name}" + (f"; did you mean --{similar}?" if similar else "; --help lists them")


def _words_of_all_flags() -> set[str]:
    """Return the words that the flags of all commands are made of, such as "gpu" and "path"."""
    from raybge.cli import options

    classes = [each for each in vars(options).values() if isinstance(each, type)]
    spellings = [spelling for each in classes for f in declared_flags(each).values() for spelling in f.spellings]
    return {word for spelling in spellings for word in spelling.split("_")}
