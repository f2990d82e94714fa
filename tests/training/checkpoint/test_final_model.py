"""Publication of a finished model in place of another one."""

import json
from pathlib import Path

import pytest

from raybge.training.checkpoint.final_model import RESULTS, finished_metrics, publish_model


def write_model(folder: Path, version: str, *names: str) -> None:
    """Write a model folder whose files contain its version."""
    for name in ("config.json", "modules.json", "model.safetensors", RESULTS, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"version": version}))


def version(path: Path) -> str:
    return json.loads(path.read_text())["version"]


def test_model_replaces_another_one_completely(tmp_path):
    output, staging = tmp_path / "out", tmp_path / "out" / ".raybge" / "model"
    old_files = ("adapter_config.json", "model-00001-of-00002.safetensors", "1_Pooling/config.json", "other.txt")
    write_model(output, "old", *old_files)
    write_model(staging, "new", "2_Normalize/config.json")
    publish_model(staging, output)
    versions = {str(p.relative_to(output)): version(p) for p in output.rglob("*") if p.is_file()}
    assert versions.pop("other.txt") == "old"
    assert set(versions.values()) == {"new"}
    assert set(versions) == {"config.json", "modules.json", "model.safetensors", RESULTS, "2_Normalize/config.json"}
    assert not (output / "1_Pooling").exists()
    assert not staging.exists() and finished_metrics(output) == {"version": "new"}


@pytest.mark.parametrize("moves", range(5))
def test_partly_published_model_cannot_be_loaded(tmp_path, monkeypatch, moves):
    """After each number of moves: no file that a loader starts from is next to a file of another model."""
    output, staging = tmp_path / "out", tmp_path / "out" / ".raybge" / "model"
    write_model(output, "old")
    write_model(staging, "new", "tokenizer.json")
    moved = []
    replace = Path.replace

    def failing_replace(path: Path, target: Path) -> Path:
        if len(moved) == moves:
            raise OSError("no space left on device")
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(OSError):
        publish_model(staging, output)
    names = {p.name for p in output.iterdir() if p.is_file()}
    assert finished_metrics(output) is None
    assert "config.json" not in names or {"model.safetensors", "tokenizer.json"} <= names
    assert "modules.json" not in names or "config.json" in names
    assert all(version(output / name) == "new" for name in names)
