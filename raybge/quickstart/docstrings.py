"""Demo data set: docstrings of installed packages as queries and passages.

The query is the first sentence of a docstring; the passage is the signature and the rest of the docstring, with the
documented name masked. Source files are parsed with `ast` and no package is imported, so extraction takes seconds and
runs no foreign code. Hashes of the seed and the module name select the files and the split: the same installed versions
give the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raybge.util.atomic_write import atomic_stream
from raybge.util.errors import UserError
from raybge.util.filesystem import filesystem

STDLIB = "stdlib"
PACKAGES = ("numpy", "torch", "pandas", "pyarrow", "ray", "transformers", STDLIB)

PASSAGE_MASK = "_"
QUERY_MASK = "..."
QUERY_WORDS = (5, 40)
PASSAGE_WORDS = 20
PASSAGE_CHARS = 1000
SIGNATURE_CHARS = 200
LONG_NAME = 8
MAX_ROWS_PER_MODULE = 15

# A docstring that starts with a section, a parameter or an example has no sentence that serves as a query.
NO_SENTENCE = re.compile(r"(?:Args|Arguments|Parameters|Returns?|Yields|Examples?)\s*:|\W*\w+\W* ?(?:\(|:|--)|>>>")

# Docstrings of tests answer no query, vendored copies belong to other packages, and site-packages is a subfolder of the
# standard library.
TESTS = ("test", "tests", "testing", "_testing", "idlelib", "lib2to3", "turtledemo", "pydoc_data")
VENDORED = ("_vendor", "_vendored", "vendored", "third_party", "thirdparty_files", "ensurepip")
SKIPPED_FOLDERS = frozenset((*TESTS, *VENDORED, "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True)
class Doc:
    """A documented function, method or class: module and name, query and passage."""

    module: str
    name: str
    query: str
    passage: str


def write_data_set(
    folder: Path,
    seed: int = 42,
    packages: Sequence[str] = PACKAGES,
    rows_per_package: int = 400,
    dev_rows: int = 400,
) -> dict[str, int]:
    """Write train.jsonl, dev.jsonl and corpus.jsonl.

    Rows of train and dev are {"query", "pos", "neg": [], "source": "module:name"}; the two share no module. The corpus
    contains every passage of both as {"text"}.

    Args:
        folder: output folder, created if missing.
        seed: seed of the selection of files and of the split.
        packages: packages to read; those that are not installed are skipped.
        rows_per_package: maximum rows per package.
        dev_rows: maximum rows of dev.

    Returns:
        Number of rows of train, dev and corpus, of modules, and of rows per package.

    Raises:
        UserError: the packages contain too few docstrings for a split.
    """
    docs = [doc for package in packages for doc in extract(package, seed, rows_per_package)]
    docs = unique(docs)
    train, dev = split_by_module(docs, seed, dev_rows)
    if not train or not dev:
        raise UserError(f"too few docstrings for a train and a dev split in: {', '.join(packages)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", (row(doc) for doc in train))
    write_jsonl(folder / "dev.jsonl", (row(doc) for doc in dev))
    write_jsonl(folder / "corpus.jsonl", ({"text": doc.passage} for doc in docs))
    counts = {package: sum(doc.module.split(".")[0] == package for doc in docs) for package in packages}
    modules = len({doc.module for doc in docs})
    return {"train": len(train), "dev": len(dev), "corpus": len(docs), "modules": modules, **counts}


def extract(package: str, seed: int, limit: int) -> list[Doc]:
    """Return up to `limit` docs of one package, modules in the order of the seed; [] if it is not installed."""
    docs: list[Doc] = []
    for module, path in sorted(source_files(package), key=lambda entry: _rank(seed, entry[0])):
        if len(docs) >= limit:
            break
        docs += unique(read_module(module, path))[:MAX_ROWS_PER_MODULE]
    return docs[:limit]


def source_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yield (module name, path) of every .py file of a package or the standard library, without importing it."""
    if package == STDLIB:
        roots = [sysconfig.get_path("stdlib")]
    else:
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [sub for sub in subfolders if sub not in SKIPPED_FOLDERS and sub.isidentifier()]
            for name in names:
                path = Path(folder, name)
                if path.suffix == ".py" and not path.stem.startswith("test_"):
                    parts = path.relative_to(root).with_suffix("").parts
                    yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def read_module(module: str, path: Path) -> list[Doc]:
    """Return the docs of one source file in line order; [] if this Python version cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in docstrings of other packages
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    docs = (make_doc(module, node) for node in documented(tree))
    return [doc for doc in docs if doc is not None]


def documented(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield public classes, their public methods, and public functions, but nothing nested in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not child.name.startswith("_"):
                yield child
                if isinstance(child, ast.ClassDef):
                    yield from documented(child)
        elif isinstance(child, ast.If | ast.Try):
            yield from documented(child)


def make_doc(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Doc | None:
    """Return query and passage of one definition, or None if its docstring is too short for them."""
    docstring = ast.get_docstring(node)
    words = name_words(node.name)
    if not docstring or len("".join(words)) < 3 or _count_words(docstring) < QUERY_WORDS[0] + PASSAGE_WORDS:
        return None
    sentence, rest = first_sentence(plain(docstring))
    if re.match(NO_SENTENCE, sentence) or not QUERY_WORDS[0] <= _count_words(sentence) <= QUERY_WORDS[1]:
        return None
    query = mask_query(sentence, node.name, words)
    body = mask_passage(rest, words)
    if _count_words(query) < QUERY_WORDS[0] or _count_words(body) < PASSAGE_WORDS:
        return None
    passage = f"{mask_passage(signature(node), words)}\n{body}"
    return Doc(module, node.name, query, _cut(passage, PASSAGE_CHARS))


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Return the parameters as written, without the name; for a class those of its __init__."""
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        return f"class {_parameters(inits[0].args)}" if inits else "class"
    returns = f" -> {_shorten(ast.unparse(node.returns))}" if node.returns else ""
    return f"def {_parameters(node.args)}{returns}"


def first_sentence(docstring: str) -> tuple[str, str]:
    """Return the first sentence of a docstring on one line, and the text after it."""
    paragraphs = re.split(r"\n\s*\n", docstring, maxsplit=1)
    if len(paragraphs) == 2 and re.match(r"[\w.]+\(.*\)", paragraphs[0], re.DOTALL):
        return first_sentence(paragraphs[1])  # docstrings of C functions start with the signature
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?:](?=\s+[A-Z`(\[-]|\s*\n\s*\n|\s*$)", paragraphs[0])
    stop = end.end() if end else len(paragraphs[0])
    return " ".join(docstring[:stop].split()).rstrip(".:"), docstring[stop:].strip()


def plain(text: str) -> str:
    """Remove the markup of reStructuredText roles and literals."""
    text = re.sub(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    return text.replace("`", "").encode("utf-8", "ignore").decode("utf-8")  # a lone surrogate cannot be encoded


def name_words(name: str) -> list[str]:
    """Return the words of an identifier: read_csv and ReadCSV both give ["read", "csv"]."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def mask_passage(text: str, words: Sequence[str]) -> str:
    """Mask the name that `words` spell, in any notation: read_csv, ReadCSV, "read CSVs"."""
    return _spelled(words).sub(PASSAGE_MASK, text)


def mask_query(text: str, name: str, words: Sequence[str]) -> str:
    """Mask the name in a query; a name of one lower-case word stays, since it is often the query's verb."""
    if len(words) == 1 and name.islower():
        return text
    return _spelled(words).sub(QUERY_MASK, text).removeprefix(QUERY_MASK).strip()


def unique(docs: Iterable[Doc]) -> list[Doc]:
    """Return the docs in order, without those whose query or passage has the letters of an earlier one."""
    seen: set[tuple[str, str]] = set()
    distinct: list[Doc] = []
    for doc in docs:
        keys = {("query", _letters(doc.query)), ("passage", _letters(doc.passage.split("\n", 1)[1])[:200])}
        if not keys & seen:
            distinct.append(doc)
        seen |= keys
    return distinct


def split_by_module(docs: Sequence[Doc], seed: int, dev_rows: int) -> tuple[list[Doc], list[Doc]]:
    """Split into (train, dev) by module, in the order of the seed; dev has at most `dev_rows` rows or a fifth."""
    room = min(dev_rows, len(docs) // 5)
    counts: dict[str, int] = {}
    for doc in docs:
        counts[doc.module] = counts.get(doc.module, 0) + 1
    held_out: set[str] = set()
    for module in sorted(counts, key=lambda module: _rank(seed + 1, module)):
        if counts[module] <= room:
            held_out.add(module)
            room -= counts[module]
    train = [doc for doc in docs if doc.module not in held_out]
    return train, [doc for doc in docs if doc.module in held_out]


def row(doc: Doc) -> dict[str, object]:
    """Return the training row of one doc."""
    return {"query": doc.query, "pos": [doc.passage], "neg": [], "source": f"{doc.module}:{doc.name}"}


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as JSON lines; the file appears under its name when it is complete."""
    with atomic_stream(*filesystem(str(path))) as out:
        for each in rows:
            out.write(f"{json.dumps(each, ensure_ascii=False)}\n".encode())


def _spelled(words: Sequence[str]) -> re.Pattern[str]:
    """Match consecutive words as an identifier or as prose, and longer identifiers that contain a long name."""
    prose = r"[\s_\-]?".join(map(re.escape, words)) + "(?:e?s|e?d|ing)?"
    # Short names are parts of unrelated words: is_in would match inside "raising".
    longer = rf"|\w*{'_?'.join(map(re.escape, words))}\w*" if len("".join(words)) >= LONG_NAME else ""
    return re.compile(rf"(?<![^\W_])(?:{prose}{longer})(?![^\W_])", re.IGNORECASE)


def _parameters(arguments: ast.arguments) -> str:
    written = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(arguments))
    return f"({_shorten(written)})"


def _shorten(code: str) -> str:
    return textwrap.shorten(code, SIGNATURE_CHARS, placeholder=" ...")


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars].rsplit(None, 1)[0]


def _count_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def _rank(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed} {module}".encode(), digest_size=16).digest()
