"""From a dataclass of flags to a parser, a help page and a checked object.

The same declaration serves the command line, `--config run.yaml` and the Python function. TrainingArguments are read
from transformers' source with `ast`: importing them costs seconds, and `--help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from raybge.util.errors import UserError

T = TypeVar("T")


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    unbuilt: bool = False,
) -> Any:
    """Declare a flag as a dataclass field. `...` means required; `unbuilt` stops the command when given."""
    about = dict(group=group, help=help, aliases=aliases, choices=choices, metavar=metavar, unbuilt=unbuilt)
    return dataclasses.field(default=MISSING if default is ... else default, metadata=about)


@dataclass(frozen=True)
class Flag:
    """One flag as the parser sees it."""

    name: str
    kind: str  # "bool", "int", "float", "str" or "json"
    many: bool
    default: Any  # MISSING when required
    group: str
    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    unbuilt: bool = False
    refused: str | None = None  # why giving it stops the command
    transformers: bool = False


def parse(arguments: type[T], argv: Sequence[str], prog: str) -> T:
    """The object of class `arguments` that the command line `argv` describes.

    Raises UserError for a flag that does not exist, a value of the wrong kind, or a required flag that is missing.
    Prints the help page and raises SystemExit(0) for --help and --help-all.
    """
    flags = declared(arguments)
    parser = _parser(arguments, flags.values(), prog, show_all="--help-all" in argv)
    if {"-h", "--help", "--help-all"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    found, unknown = parser.parse_known_args(list(argv))
    for word in unknown:
        raise UserError(_unknown(word, flags) if word.startswith("--") else f"«{word}» belongs to no flag")
    given = vars(found)
    return build(arguments, {**read_config(given.get("config"), flags), **given})


def build(arguments: type[T], given: Mapping[str, Any]) -> T:
    """The object of class `arguments` for flags by name or alias; checks names, kinds, choices and what is missing."""
    flags = declared(arguments)
    names = {spelling: f for f in flags.values() for spelling in (f.name, *f.aliases)}
    values: dict[str, Any] = {}
    for spelling, value in given.items():
        if spelling not in names:
            raise UserError(_unknown(f"--{spelling}", flags))
        f = names[spelling]
        value = _convert(f, value)
        if value is None:
            continue  # as if it was not given
        values[f.name] = value
        if f.unbuilt and values[f.name] != f.default:
            raise UserError(f"--{f.name} is not built yet")
        if f.refused and values[f.name] != f.default:
            raise UserError(f"--{f.name} cannot be used: {f.refused}")
    missing = [f"--{f.name}" for f in flags.values() if f.default is MISSING and f.name not in values]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}")
    training = {f.name: values.pop(f.name) for f in flags.values() if f.transformers and f.name in values}
    return arguments(**values, **({"training": training} if _takes_training(arguments) else {}))


def declared(arguments: type) -> dict[str, Flag]:
    """The flags of a class of arguments by name, those of TrainingArguments among them where the class takes them."""
    hints = get_type_hints(arguments)
    flags: dict[str, Flag] = {}
    for f in dataclasses.fields(arguments):
        if "group" in f.metadata:
            kind, many = _kind(hints[f.name])
            flags[f.name] = Flag(name=f.name, kind=kind, many=many, default=f.default, **f.metadata)
    if _takes_training(arguments):
        flags.update({name: f for name, f in training_flags().items() if name not in flags})
    return flags


def given(arguments: Any) -> dict[str, Any]:
    """The flags of a checked object that are not at their defaults; no secrets."""
    flags = declared(type(arguments))
    values = {**vars(arguments), **getattr(arguments, "training", {})}
    return {
        name: values[name]
        for name, f in flags.items()
        if name in values and values[name] != f.default and not name.endswith("token")
    }


@cache
def training_flags() -> dict[str, Flag]:
    """The flags of transformers.TrainingArguments, read from its source."""
    from raybge.cli.options import REFUSED

    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise UserError("transformers is not installed")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    flags = {}
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name, hint = node.target.id, ast.unparse(node.annotation)
        keywords = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        about = keywords.get("metadata")
        keys = dict(zip(map(_literal, about.keys), about.values, strict=True)) if isinstance(about, ast.Dict) else {}
        text = _literal(keys.get("help")) or ""
        flags[name] = Flag(
            name=name,
            kind=_training_kind(hint),
            many="list[str]" in hint,
            # output_dir has no useful default: the Trainer would write into the current folder.
            default=MISSING if name == "output_dir" else _literal(keywords.get("default")),
            group="transformers.TrainingArguments",
            help=text.replace("%%", "%"),
            refused=REFUSED.get(name),
            transformers=True,
        )
    return flags


def as_json(value: str) -> Any:
    """A JSON object given as text or as the path of a file."""
    try:
        found = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text())
    except OSError as error:
        raise UserError(f"cannot read {value}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{value} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{value}: expected a JSON object, found {type(found).__name__}")
    return found


def _takes_training(arguments: type) -> bool:
    return any(f.metadata.get("training_arguments") for f in dataclasses.fields(arguments))


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _training_kind(hint: str) -> str:
    if "dict" in hint:
        return "json"
    plain = [k for k in ("str", "bool", "float", "int") if k in hint.replace("IntervalStrategy", "")]
    return plain[0] if plain else "str"


def _kind(hint: Any) -> tuple[str, bool]:
    options = (
        [h for h in (get_args(hint) or (hint,)) if h is not type(None)] if get_origin(hint) is not list else [hint]
    )
    many = get_origin(options[0]) is list
    return (get_args(options[0])[0] if many else options[0]).__name__, many


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found «{text}»")
    return text.lower() in ("true", "1", "yes")


def _fraction(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)  # it would pass every check of a range
    return value


READERS: dict[str, Callable[[str], Any]] = {
    "bool": _boolean,
    "int": int,
    "float": _fraction,
    "str": str,
    "json": as_json,
}


def _reader(f: Flag) -> Callable[[str], Any]:
    """What makes a flag's value out of text; what is wrong inside a file is said with the flag's name."""

    def read(text: str) -> Any:
        try:
            return READERS[f.kind](text)
        except UserError as error:
            raise UserError(f"--{f.name}: {error}") from error

    read.__name__ = f.kind  # argparse names the kind in its message
    return read


EXPECTED = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "json": (dict,)}


def _convert(f: Flag, value: Any) -> Any:
    """`value`, from YAML or Python, as the kind that the flag has."""
    if isinstance(value, Path):
        value = str(value)
    if value is None or (f.transformers and not isinstance(value, str) and (f.many or f.kind in ("str", "json"))):
        return value  # TrainingArguments checks its own objects
    if f.many:
        value = list(value) if isinstance(value, list | tuple) else [value]
        return [_convert(dataclasses.replace(f, many=False), v) for v in value]
    try:
        if isinstance(value, str) and f.kind != "str":
            value = _reader(f)(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--{f.name} takes {_article(f.kind)}, found «{value}»") from None
    if f.kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # YAML reads `num_workers: 2` as a number
    wrong = (isinstance(value, bool) and f.kind in ("int", "float")) or (isinstance(value, float) and math.isnan(value))
    if not isinstance(value, EXPECTED[f.kind]) or wrong:
        raise UserError(f"--{f.name} takes {_article(f.kind)}, found {value!r}")
    if f.choices and value not in f.choices:
        raise UserError(f"--{f.name} takes one of {', '.join(f.choices)}, found «{value}»")
    return value


def _article(kind: str) -> str:
    return {
        "bool": "True or False",
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "json": "a JSON object or the path of one",
    }[kind]


def read_config(path: str | None, flags: Mapping[str, Flag], option: str = "--config") -> dict[str, Any]:
    """The values by name in a YAML file of flags; nothing without a path. UserError naming the `option`."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        # YAML lets some of what its values raise pass: 2020-99-99 is no date
        raise UserError(f"{option} {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: expected lines `flag: value`")
    names = {spelling: f.name for f in flags.values() for spelling in (f.name, *f.aliases)}
    for name in content:
        if name not in names:
            raise UserError(f"{option} {path}: {_unknown(f'--{name}', flags)}")
    # One spelling of each name, so that an alias on the command line still overrides the file.
    return {names[name]: value for name, value in content.items()}


def _unknown(word: str, flags: Mapping[str, Flag]) -> str:
    name = word[2:].split("=")[0]
    near = difflib.get_close_matches(name, [s for f in flags.values() for s in (f.name, *f.aliases)], n=1)
    return f"there is no flag --{name}" + (f"; did you mean --{near[0]}?" if near else "; --help lists them")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser(arguments: type, flags: Iterable[Flag], prog: str, show_all: bool) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=arguments.__doc__,
        usage=f"{prog} --flag value ...",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=110),
    )
    groups: dict[str, Any] = {"required": parser.add_argument_group("required")}
    for f in flags:
        hidden = f.transformers and not show_all and f.default is not MISSING
        group = "required" if f.default is MISSING else f.group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options: dict[str, Any] = {"dest": f.name, "type": _reader(f), "help": _help(f, hidden)}
        if f.kind == "bool":
            options |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            options |= {"nargs": "+"} if f.many else {}
            options |= {"metavar": f.metavar or ("TEXT" if f.kind == "str" else f.kind.upper())}
            options |= {"choices": f.choices, "metavar": "|".join(f.choices)} if f.choices else {}
        groups[group].add_argument(*(f"--{s}" for s in (f.name, *f.aliases)), **options)
    about = parser.add_argument_group("help")
    about.add_argument("--help", "-h", action="store_true", help="this page")
    if any(f.transformers for f in flags):
        about.add_argument("--help-all", action="store_true", help="this page and every TrainingArguments flag")
    return parser


def _help(f: Flag, hidden: bool) -> str:
    if hidden:
        return argparse.SUPPRESS
    shown = "" if f.default in (MISSING, None) else f" (default: {f.default})"
    state = " [not built yet]" if f.unbuilt else f" [refused: {f.refused}]" if f.refused else ""
    return (f.help + shown + state).replace("%", "%%")
