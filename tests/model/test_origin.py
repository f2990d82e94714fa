"""The base model that a card names, with its license and languages: from its own card, without a local path."""

from pathlib import Path

import pytest

from raybge.model.origin import ModelOrigin


def folder_with_card(folder: Path, front_matter: str) -> str:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# Title\n\n---\nlicense: none\n---\n")
    return str(folder)


def test_a_local_folder_has_the_base_of_its_own_card(tmp_path, monkeypatch):
    path = folder_with_card(
        tmp_path / "runs" / "mine", "base_model: BAAI/bge-small-en-v1.5\nlicense: mit\nlanguage:\n- en\n- de"
    )
    expected = ModelOrigin("mine", "BAAI/bge-small-en-v1.5", "mit", ("en", "de"))
    assert ModelOrigin.of(path) == expected
    monkeypatch.chdir(tmp_path)  # a relative path has the form of a hub name
    assert ModelOrigin.of("runs/mine") == ModelOrigin.of("runs/mine/") == expected


def test_a_folder_without_a_base_is_named_by_its_last_part(tmp_path):
    path = folder_with_card(tmp_path / "mine", "license: apache-2.0\nlanguage: en")
    assert ModelOrigin.of(path) == ModelOrigin("mine", None, "apache-2.0", ("en",))
    (tmp_path / "bare").mkdir()
    assert ModelOrigin.of(str(tmp_path / "bare")) == ModelOrigin("bare")


def test_a_folder_of_the_hubs_cache_is_that_model(tmp_path):
    path = folder_with_card(tmp_path / "models--BAAI--bge-m3" / "snapshots" / "5617a9f6", "license: mit")
    assert ModelOrigin.of(path) == ModelOrigin("BAAI/bge-m3", "BAAI/bge-m3", "mit")


def test_a_hub_name_is_the_model_itself():
    assert ModelOrigin.of("BAAI/bge-m3") == ModelOrigin("BAAI/bge-m3", "BAAI/bge-m3")


@pytest.mark.parametrize(
    "front_matter",
    ["license: [", "- a\n- list", "license: {a: b}\nlanguage: 3\nbase_model: ../runs/x", "license:\nlanguage: no"],
)
def test_a_card_that_cannot_be_read_gives_nothing(tmp_path, front_matter):
    assert ModelOrigin.of(folder_with_card(tmp_path / "mine", front_matter)) == ModelOrigin("mine")
