"""Data set of the demo: rows, masks, and splits that share no module."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raybge.quickstart import docstrings
from raybge.util.errors import UserError

PACKAGE = "fakelibrary"
FILES = ("train.jsonl", "dev.jsonl", "corpus.jsonl")
MODULE = '''
raise RuntimeError("a parsed package must not be imported")

class WidgetStore{n}:
    """Keeps all widgets of one factory floor {word} in memory.

    A widget store holds what was made on {word} until somebody comes and asks for it. WidgetStore{n} objects
    may be shared between threads, as every change takes a lock first and gives it back afterwards.
    """

    def __init__(self, capacity: int = {n}):
        self.capacity = capacity

    def fetch_widget(self, serial: str) -> bytes:
        """Return the finished widget whose serial number of {word} is given.

        The `fetch_widget` method looks in memory first and then on disk; a call to fetch widget {word} with a
        serial that nobody made raises KeyError, and old_fetch_widget_{n} is what earlier releases called it.
        """

def _hidden(x):
    """Count the hidden things in the big box of {word}.

    This one is private and must stay away from every row however long its description may go on, and on.
    """
'''
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "site" / PACKAGE
    (root / "deep").mkdir(parents=True)
    (root / "tests").mkdir()
    for n, word in enumerate(WORDS):
        place = root / "deep" if n % 2 else root
        (place / f"part{n}.py").write_text(MODULE.format(n=n + 10, word=word))
    (root / "__init__.py").write_text('raise RuntimeError("imported")\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "tests" / "part.py").write_text(MODULE.format(n=99, word="kelp"))
    monkeypatch.syspath_prepend(str(root.parent))
    yield root
    assert PACKAGE not in sys.modules


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_valid_and_corpus_holds_every_passage(library: Path, tmp_path: Path) -> None:
    counts = docstrings.write_data_set(tmp_path / "out", packages=[PACKAGE, "no_such_package_here"])
    train, dev, corpus = (read(tmp_path / "out" / name) for name in FILES)
    assert [counts["train"], counts["dev"], counts["corpus"]] == [len(train), len(dev), len(corpus)] == [16, 4, 20]
    assert counts[PACKAGE] == 20 and counts["no_such_package_here"] == 0
    for row in train + dev:
        assert row["query"].strip() and row["neg"] == []
        assert len(row["pos"]) == 1 and row["pos"][0].strip()
    passages = [row["text"] for row in corpus]
    assert len(set(passages)) == len(passages)
    assert {row["pos"][0] for row in train + dev} == set(passages)
    assert not list((tmp_path / "out").glob(".*")), "a part file was left behind"


def test_no_module_is_in_two_splits(library: Path, tmp_path: Path) -> None:
    docstrings.write_data_set(tmp_path, packages=[PACKAGE])
    train, dev = ({row["source"].split(":")[0] for row in read(tmp_path / name)} for name in FILES[:2])
    assert train and dev and not train & dev
    assert f"{PACKAGE}.deep.part1" in train | dev, "modules are named by their path"


def test_same_seed_same_bytes_and_other_seed_other_split(library: Path, tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        docstrings.write_data_set(tmp_path / folder, seed=seed, packages=[PACKAGE])
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "dev.jsonl").read_bytes() != (tmp_path / "c" / "dev.jsonl").read_bytes()


def test_names_private_things_and_tests_stay_out(library: Path, tmp_path: Path) -> None:
    docstrings.write_data_set(tmp_path, packages=[PACKAGE])
    rows = read(tmp_path / "train.jsonl") + read(tmp_path / "dev.jsonl")
    assert {row["source"].split(":")[1][:11] for row in rows} == {"WidgetStore", "fetch_widge"}
    for row in rows:
        passage = row["pos"][0].lower()
        if row["source"].endswith("fetch_widget"):
            assert "fetch_widget" not in passage and "fetch widget" not in passage
            assert passage.startswith("def (serial: str) -> bytes\n")
        else:
            assert "widgetstore" not in passage
            assert passage.startswith("class (capacity: int=")
        assert "kelp" not in passage and row["query"].split()[0] in ("Keeps", "Return")


@pytest.mark.parametrize(
    ("name", "text", "masked"),
    [
        ("read_csv", "read_csv, ReadCSV, read-csv and read CSV differ", "_, _, _ and _ differ"),
        ("read_csv", "pd.read_csv(path)", "pd._(path)"),
        ("is_in", "this input is in raisins", "this input _ raisins"),
        ("DataLoader", "a _DataLoaderIter of DataLoaders", "a _ of _"),
        ("sort", "Sorted copies; np.sort(a), resort", "_ copies; np._(a), resort"),
    ],
)
def test_a_name_is_masked_in_every_spelling(name: str, text: str, masked: str) -> None:
    assert docstrings.mask_passage(text, docstrings.name_words(name)) == masked


def test_a_query_keeps_its_verb_and_loses_an_identifier() -> None:
    assert docstrings.mask_query("Sort an array in place", "sort", ["sort"]) == "Sort an array in place"
    words = docstrings.name_words("DataLoader")
    assert docstrings.mask_query("Make a DataLoader for it", "DataLoader", words) == "Make a ... for it"


@pytest.mark.parametrize(
    ("docstring", "sentence", "rest"),
    [
        ("Do it, e.g. Now, at once. Then rest.\n\nMore.", "Do it, e.g. Now, at once", "Then rest.\n\nMore."),
        ("f(x) -> y\n\nTurn x\ninto y.\n\nRest.", "Turn x into y", "Rest."),
        ("No stop here\n\nArgs:\n  x: it", "No stop here", "Args:\n  x: it"),
        ("Version 1.5 is read.", "Version 1.5 is read", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str, rest: str) -> None:
    assert docstrings.first_sentence(docstring) == (sentence, rest)


def test_equal_questions_and_equal_answers_are_kept_once() -> None:
    docs = [
        docstrings.Doc("a", "f", "Get the value", "def ()\nIt is there."),
        docstrings.Doc("a", "g", "get the value!", "def ()\nIt is elsewhere."),
        docstrings.Doc("a", "h", "Put the value", "def (x)\nIt is  there 2."),
        docstrings.Doc("b", "i", "Drop the value", "def ()\nIt is gone."),
    ]
    assert [doc.name for doc in docstrings.unique(docs)] == ["f", "i"]


def test_too_little_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_package_here"):
        docstrings.write_data_set(tmp_path / "out", packages=["no_such_package_here"])
    assert not (tmp_path / "out").exists()
