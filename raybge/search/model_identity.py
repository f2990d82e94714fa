"""What tells two models apart, wherever they lie: a hash of the weights and of all that shapes a vector."""

from __future__ import annotations

import re
from pathlib import Path

from raybge.model.folder import read_settings
from raybge.search.store import digest, files_digest

# Weights, configuration, tokenizer and code. Not the card, the curve, or a run's checkpoints.
_SHAPING = frozenset({".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".py", ".jinja"})
_OF_A_RUN = frozenset({"train_results.json", "trainer_state.json", "all_results.json", "eval_results.json"})
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


def model_identity(name: str, cache_dir: str | None = None) -> str:
    """32 hexadecimal digits that change with the model: of a folder its files, of a hub's model its commit."""
    folder = Path(name)
    if not folder.is_dir():
        return digest(name, _commit(name, cache_dir))
    files = [
        path
        for path in [*folder.iterdir(), *folder.glob("[0-9]_*/*")]
        if path.is_file() and path.suffix in _SHAPING and path.name not in _OF_A_RUN
    ]
    base = read_settings(name, cache_dir).base
    return digest(files_digest(files), model_identity(base, cache_dir) if base else None)


def _commit(name: str, cache_dir: str | None) -> str | None:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", cache_dir=cache_dir)
    except Exception:  # whatever it is, loading the model will say it better
        return None
    found = _COMMIT.search(Path(path).as_posix())
    return found[1] if found else None
