"""The demo's text: docstrings of installed packages as queries and passages.

A query is what a docstring's first sentence asks for; its passage is the signature and the rest of the
docstring, with the documented name masked. Source files are read with `ast`, no package is imported, so the
harvest takes seconds and runs no foreign code. Which files are read, and which module lands in which split,
follows from hashes of the seed and the module's name: the same installed versions give the same bytes.
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

from raybge.util.errors import UserError

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

# A docstring that opens with a section, with a parameter's own line or with an example asks for nothing.
NO_SENTENCE = re.compile(r"(?:Args|Arguments|Parameters|Returns?|Yields|Examples?)\s*:|\W*\w+\W* ?(?:\(|:|--)|>>>")

# Tests answer no question, vendored copies are other packages' text, and site-packages lies inside the
# standard library's folder.
TESTS = ("test", "tests", "testing", "_testing", "idlelib", "lib2to3", "turtledemo", "pydoc_data")
VENDORED = ("_vendor", "_vendored", "vendored", "third_party", "thirdparty_files", "ensurepip")
SKIPPED_FOLDERS = frozenset((*TESTS, *VENDORED, "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True)
class Doc:
    """One documented function, method or class: where it is, what asks for it and what answers."""

    module: str
    name: str
    query: str
    passage: str


def build(
    folder: Path,
    seed: int = 42,
    packages: Sequence[str] = PACKAGES,
    rows_per_package: int = 400,
    dev_rows: int = 400,
) -> dict[str, int]:
    """Write train.jsonl, dev.jsonl and corpus.jsonl into `folder`; return the counts.

    train and dev rows are {"query", "pos", "neg": [], "source": "module:name"}; a module is in one of them
    only. The corpus holds every passage of both as {"text"}. A package that is not installed is left out.
    Raises UserError if the packages give too little text to split.
    """
    docs = [doc for package in packages for doc in harvest(package, seed, rows_per_package)]
    docs = unique(docs)
    train, dev = split_by_module(docs, seed, dev_rows)
    if not train or not dev:
        raise UserError(f"too few docstrings for a train and a dev split in: {', '.join(packages)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", (row(doc) for doc in train))
    write_jsonl(folder / "dev.jsonl", (row(doc) for doc in dev))
    write_jsonl(folder / "corpus.jsonl", ({"text": doc.passage} for doc in docs))
    found = {package: sum(doc.module.split(".")[0] == package for doc in docs) for package in packages}
    modules = len({doc.module for doc in docs})
    return {"train": len(train), "dev": len(dev), "corpus": len(docs), "modules": modules, **found}


def harvest(package: str, seed: int, limit: int) -> list[Doc]:
    """Up to `limit` docs of one package, its modules read in the seed's order; [] if it is not installed."""
    docs: list[Doc] = []
    for module, path in sorted(source_files(package), key=lambda found: _rank(seed, found[0])):
        if len(docs) >= limit:
            break
        docs += unique(read_module(module, path))[:MAX_ROWS_PER_MODULE]
    return docs[:limit]


def source_files(package: str) -> Iterator[tuple[str, Path]]:
    """(module name, path) of every .py file of a package or of the standard library; nothing is imported."""
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
    """The docs of one source file in the order of its lines; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found = (make_doc(module, node) for node in documented(tree))
    return [doc for doc in found if doc is not None]


def documented(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public classes, their public methods and public functions, not what is nested inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not child.name.startswith("_"):
                yield child
                if isinstance(child, ast.ClassDef):
                    yield from documented(child)
        elif isinstance(child, ast.If | ast.Try):
            yield from documented(child)


def make_doc(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Doc | None:
    """Query and passage of one definition, or None where the docstring is too short to ask or to answer."""
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
    """The parameters as written, without the name; for a class those of its __init__."""
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        return f"class {_parameters(inits[0].args)}" if inits else "class"
    returns = f" -> {_shorten(ast.unparse(node.returns))}" if node.returns else ""
    return f"def {_parameters(node.args)}{returns}"


def first_sentence(docstring: str) -> tuple[str, str]:
    """The first sentence of a docstring on one line, and the text after it."""
    paragraphs = re.split(r"\n\s*\n", docstring, maxsplit=1)
    if len(paragraphs) == 2 and re.match(r"[\w.]+\(.*\)", paragraphs[0], re.DOTALL):
        return first_sentence(paragraphs[1])  # a signature comes first, as in docstrings of C functions
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?:](?=\s+[A-Z`(\[-]|\s*\n\s*\n|\s*$)", paragraphs[0])
    stop = end.end() if end else len(paragraphs[0])
    return " ".join(docstring[:stop].split()).rstrip(".:"), docstring[stop:].strip()


def plain(text: str) -> str:
    """Text without the marks of reStructuredText roles and literals."""
    text = re.sub(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    return text.replace("`", "").encode("utf-8", "ignore").decode("utf-8")  # a lone surrogate is no text


def name_words(name: str) -> list[str]:
    """The words of an identifier: read_csv and ReadCSV both give ["read", "csv"]."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def mask_passage(text: str, words: Sequence[str]) -> str:
    """Text without the name that `words` spell, however it is written: read_csv, ReadCSV, "read CSVs"."""
    return _spelled(words).sub(PASSAGE_MASK, text)


def mask_query(text: str, name: str, words: Sequence[str]) -> str:
    """A query without the name; a name that is one lower-case word stays, as the question needs its verb."""
    if len(words) == 1 and name.islower():
        return text
    return _spelled(words).sub(QUERY_MASK, text).removeprefix(QUERY_MASK).strip()


def unique(docs: Iterable[Doc]) -> list[Doc]:
    """Docs in their order, without those that ask or answer as an earlier one does, letters compared."""
    seen: set[tuple[str, str]] = set()
    kept: list[Doc] = []
    for doc in docs:
        keys = {("query", _letters(doc.query)), ("passage", _letters(doc.passage.split("\n", 1)[1])[:200])}
        if not keys & seen:
            kept.append(doc)
        seen |= keys
    return kept


def split_by_module(docs: Sequence[Doc], seed: int, dev_rows: int) -> tuple[list[Doc], list[Doc]]:
    """(train, dev): whole modules go to dev in the seed's order, `dev_rows` or a fifth of all at most."""
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
    """The training row of one doc."""
    return {"query": doc.query, "pos": [doc.passage], "neg": [], "source": f"{doc.module}:{doc.name}"}


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as JSON lines; the file has its name only once it is whole."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8", newline="\n") as out:
        for each in rows:
            out.write(json.dumps(each, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def _spelled(words: Sequence[str]) -> re.Pattern[str]:
    """Matches the words in a row, as an identifier or as prose, and longer identifiers around a long name."""
    prose = r"[\s_\-]?".join(map(re.escape, words)) + "(?:e?s|e?d|ing)?"
    # Short names are parts of unrelated words: is_in would be found in "raising".
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
