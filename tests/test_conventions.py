"""The layout and the language of raybge's source: what CONTRIBUTING.md asks of every change."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raybge"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}

MOST_LINES, MOST_FUNCTION_LINES, MOST_COMMAND_LINES = 400, 60, 60
SHARED_BASENAMES = {"run", "spec", "page", "__init__"}
COMMANDS = {
    "mine",
    "train",
    "pretrain",
    "tune",
    "merge",
    "evaluate",
    "encode",
    "export",
    "demo",
    "selftest",
    "row_log",
    "runs",
}
CLAUSE = re.compile(r"(What|Whether|Those|Of|How|Where|Which|Who|When)\b")
PARTICIPLES = {"found", "said", "told", "kept", "asked", "given", "made", "about"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def definitions(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_package_has_modules() -> None:
    """The checks below would pass on an empty folder."""
    assert len(MODULES) > 100


@pytest.mark.parametrize("folder", ["raybge", "tests", "benchmarks", "jobs"])
def test_no_file_is_long(folder: str) -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_is_long() -> None:
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


def test_no_module_name_is_used_twice() -> None:
    counts = Counter(path.stem for path in MODULES if path.stem not in SHARED_BASENAMES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_public_class_name_is_used_twice() -> None:
    counts = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in counts.items() if count > 1] == []


def test_only_commands_are_on_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__", "__main__"}
    lengths = {name: len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in COMMANDS}
    assert {name: length for name, length in lengths.items() if length > MOST_COMMAND_LINES} == {}


def test_docstrings_are_statements() -> None:
    clauses = [
        f"{name_of(path)}:{getattr(node, 'lineno', 1)} {docstring.splitlines()[0]}"
        for path, tree in TREES.items()
        for node in definitions(tree)
        if (docstring := ast.get_docstring(node)) and CLAUSE.match(docstring)
    ]
    assert len(clauses) <= 5, clauses


def test_names_are_nouns() -> None:
    assigned = [
        f"{name_of(path)}:{node.lineno} {name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (name := _assigned_name(node)) in PARTICIPLES
    ]
    assert len(assigned) <= 10, assigned


def _assigned_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return node.arg if isinstance(node, ast.arg) else None


def test_only_specs_read_flags() -> None:
    """Flags are resolved once: a command makes specs of its options object and passes those on.

    Exceptions: `cli/` declares and checks options, and the modules on top pass them to `run.py`, whose public functions
    pass them to a constructor.
    """
    readers = {path: _option_readers(path, tree) for path, tree in TREES.items()}
    specs = {path for path in MODULES if path.stem == "spec" or path.stem.endswith("_spec")}
    exempt = {path for path in MODULES if path.parent == PACKAGE or path.is_relative_to(PACKAGE / "cli")}
    assert sum(bool(readers[path]) for path in specs) >= 5  # the names of the classes are found
    assert [each for path in MODULES if path not in specs | exempt for each in readers[path]] == []


def _option_readers(path: Path, tree: ast.Module) -> list[str]:
    """Return the functions of a module that take an options object, except the public ones of a `run.py`."""
    exported = ast.walk(TREES[PACKAGE / "cli" / "options" / "__init__.py"])
    classes = {each.name for each in exported if isinstance(each, ast.alias) and each.name.endswith("Options")}
    return [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (path.stem == "run" and node in tree.body and not node.name.startswith("_"))
        if any(_annotated_names(each) & classes for each in ast.walk(node.args) if isinstance(each, ast.arg))
    ]


def _annotated_names(argument: ast.arg) -> set[str]:
    """Return the names in an argument's annotation, which may be quoted."""
    nodes = ast.walk(argument.annotation) if argument.annotation else ()
    texts = (each.id if isinstance(each, ast.Name) else getattr(each, "value", "") for each in nodes)
    return {word for text in texts if isinstance(text, str) for word in re.findall(r"\w+", text)}
