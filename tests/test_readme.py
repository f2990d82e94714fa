"""The Python snippets in README's chapters on vectors and merging run as they are, with a local model."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny import SENTENCE, make_tiny

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def snippet():
    """Return a function that finds a block of the chapter by a word, with the path of the model inserted."""
    chapter = re.search(r"^## Vectors\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    blocks = re.findall(r"^```python\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL)

    def find(word: str, model: str) -> str:
        (block,) = [block for block in blocks if word in block]
        return block.replace('"runs/mine"', repr(model))

    assert len(blocks) == 4
    return find


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return a model that distinguishes the snippets' words, in the format of sentence-transformers, with prompts."""
    from raybge import Encoder

    folder = tmp_path_factory.mktemp("models")
    words = "what causes tides Yeast turns sugar into carbon dioxide . The moon pulls the oceans".split()
    known = list(dict.fromkeys([*words, *SENTENCE.split()]))
    made = make_tiny(folder / "tiny", words=known, hidden_size=128, num_attention_heads=2)
    Encoder(made, devices="cpu", query_instruction_for_retrieval="what is ").save(folder / "saved")
    return str(folder / "saved")


@pytest.fixture
def names(snippet, model) -> dict:
    """Return the names that the first snippet defines."""
    namespace: dict = {}
    exec(snippet("import raybge", model), namespace)
    return namespace


def test_the_plain_snippet(names):
    vectors, scores = names["vectors"], names["scores"]
    assert vectors.shape == (2, 128) and scores.shape == (1, 2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (np.abs(scores) <= 1).all() and abs(scores[0, 0] - scores[0, 1]) > 0.01
    assert names["short"].shape == names["small"].shape == (2, 64) and names["small"].dtype == np.int8
    np.testing.assert_array_equal(np.unpackbits(names["bits"], axis=1), names["short"] > 0)


def test_the_snippet_of_sentence_transformers(names, snippet, model):
    ours = names["scores"]
    exec(snippet("sentence_transformers", model), names)
    np.testing.assert_allclose(names["scores"], ours, atol=1e-5)


def test_the_snippet_of_langchain(names, snippet, model):
    pytest.importorskip("langchain_core", reason="LangChain is not installed (pip install langchain-core)")
    ours = names["scores"][0]
    exec(snippet("langchain_core", model), names)
    found = {document.page_content: score for document, score in names["found"]}
    np.testing.assert_allclose([found[text] for text in names["passages"]], ours, atol=1e-5)


def test_the_snippet_of_llamaindex(names, snippet, model):
    pytest.importorskip("llama_index.core", reason="LlamaIndex is not installed (pip install llama-index-core)")
    ours = names["scores"][0]
    exec(snippet("llama_index", model), names)
    found = {each.text: each.score for each in names["found"]}
    np.testing.assert_allclose([found[text] for text in names["passages"]], ours, atol=1e-5)


def test_the_snippets_on_merging(model, tmp_path, monkeypatch):
    """A model merged with itself stays the same for any weights."""
    from raybge import Encoder

    monkeypatch.chdir(tmp_path)
    chapter = re.search(r"^## Merging models\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[
        1
    ]
    blocks = re.findall(r"^```python\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block.replace('"runs/mine"', repr(model)).replace('"BAAI/bge-small-en-v1.5"', repr(model)), names)
    assert len(blocks) == 2
    before = Encoder(model, devices="cpu").encode_queries(["what causes tides"])
    for folder in ("runs/mixed", "runs/mixed_by_examples"):
        after = Encoder(folder, devices="cpu").encode_queries(["what causes tides"])
        np.testing.assert_allclose(after, before, atol=1e-5)
