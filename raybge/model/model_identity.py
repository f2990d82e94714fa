"""Identity of a model, independent of its path: a digest of the weights and of everything that shapes a vector."""

from __future__ import annotations

import re
from pathlib import Path

from raybge.model.folder import read_settings
from raybge.util.digest import digest, files_digest

# Weights, configuration, tokenizer and code; not the model card, charts or a run's checkpoints.
_MODEL_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".py", ".jinja"})
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt"})
_RUN_FILES = frozenset({"train_results.json", "trainer_state.json", "all_results.json", "eval_results.json"})
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


def model_identity(name: str, cache_dir: str | None = None) -> str:
    """Return 32 hexadecimal digits that identify a model: files of a folder, commit of a model on the hub.

    Args:
        name: folder or hub name.
        cache_dir: hub cache.

    Returns:
        The digest; for a folder of adapters it includes the base model's.
    """
    folder = Path(name)
    if not folder.is_dir():
        return digest(name, _commit(name, cache_dir))
    base = read_settings(name, cache_dir).base
    return digest(files_digest(_model_files(folder)), model_identity(base, cache_dir) if base else None)


def weights_identity(name: str) -> str:
    """Return 32 hexadecimal digits that identify the weights of a model's folder and its config.json."""
    files = [each for each in _model_files(Path(name)) if each.suffix in _WEIGHT_SUFFIXES or each.name == "config.json"]
    return files_digest(files)


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that shape a vector."""
    return [
        path
        for path in [*folder.iterdir(), *folder.glob("[0-9]_*/*")]
        if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name not in _RUN_FILES
    ]


def _commit(name: str, cache_dir: str | None) -> str | None:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", cache_dir=cache_dir)
    except Exception:  # any cause: loading the model reports it with more detail
        return None
    match = _COMMIT.search(Path(path).as_posix())
    return match[1] if match else None
