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

MOST_LINES, MOST_FUNCTION_LINES, MOST_COMMAND_LINES = 400, 70, 60
SHARED_BASENAMES = {"run", "spec", "page", "__init__"}
COMMANDS = {"mine", "train", "pretrain", "tune", "merge", "evaluate", "encode", "demo", "row_log"}
CLAUSE = re.compile(r"(What|Whether|Those|Of|How|Where|Which|Who|When)\b")
PARTICIPLES = {"found", "said", "told", "kept", "asked", "given", "made", "about"}
LIBRARIES = {"ray", "torch", "transformers", "accelerate"}
# transformers calls these methods of its Trainer: raybge overrides them and calls the original.
OVERRIDING = PACKAGE / "training" / "trainer.py"


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


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each private module or attribute of LIBRARIES that `tree` imports or reads.

    Attributes are those of objects: of which library an object is cannot be seen, so each private attribute counts but
    those of `self`, `cls` and of modules' own classes.
    """
    own = {f"_{name}" for name in _own_private_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            words = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(word.startswith("_") for word in words):
                yield node.lineno, f"{node.module}: {', '.join(alias.name for alias in node.names)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                words = alias.name.split(".")
                if words[0] in LIBRARIES and any(word.startswith("_") for word in words):
                    yield node.lineno, alias.name
        private = isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and node.attr not in own
        if private and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node.lineno, ast.unparse(node)


def _own_private_names(tree: ast.AST) -> set[str]:
    """Return the private methods and attributes that the module's own classes define, without their underscore."""
    methods = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("_")}
    attributes = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and n.attr.startswith("_")
        if isinstance(n.value, ast.Name) and n.value.id == "self"
    }
    return {name.removeprefix("_") for name in methods | attributes}


def test_private_names_of_libraries_are_in_compat() -> None:
    uses = [
        f"{name_of(path)}:{line} {name}"
        for path, tree in TREES.items()
        if path.parent.name != "compat" and path != OVERRIDING
        for line, name in private_names(tree)
    ]
    assert uses == []


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.worker",
        "from ray._private import worker",
        "from torch.distributed.rendezvous import _create_c10d_store",
        "model.config._attn_implementation",
    ],
)
def test_a_private_name_is_noticed(source: str) -> None:
    assert list(private_names(ast.parse(source)))
