"""Files of a model folder that are meant to be published.

An output folder also holds what is not: checkpoints, hidden folders with texts of the data, records of rows, results,
and the report with held-out texts and local paths.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

# All files that a model folder of any tool may hold at its top, and of its modules.
MODEL_FILES = (
    "README.md modules.json config.json adapter_config.json *.safetensors *.safetensors.index.json pytorch_model*.bin* "
    "config_sentence_transformers.json sentence_*_config.json generation_config.json tokenizer* added_tokens.json "
    "special_tokens_map.json vocab.* merges.txt sentencepiece* spiece.model chat_template* [0-9]_*/*.*"
).split()
_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")  # of models with code of their own


def model_files(folder: str | Path) -> list[str]:
    """Return the files of the model in an output folder, relative to it; the card first."""
    top = Path(folder)
    paths = [path for pattern in (*MODEL_FILES, *_CODE) for path in top.glob(pattern) if path.is_file()]
    return sorted({path.relative_to(top).as_posix() for path in paths}, key=lambda name: (name != "README.md", name))


def upload_command(folder: str | Path) -> str:
    """Return the shell command that uploads the files of a model, and no others, to the hub."""
    includes = [f"--include {shlex.quote(name)}" for name in model_files(folder)]
    return " ".join(["hf upload OWNER/NAME", shlex.quote(str(folder)), ".", *includes])


def upload_obstacle(folder: str | Path) -> str | None:
    """Return why a model cannot be used by others once it is uploaded; None if it can."""
    path = Path(folder, "adapter_config.json")
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path.is_file() else None
    if isinstance(base, str) and os.path.isabs(base):
        return "its adapters name a local folder as their base model; train with --save_merged_lora_model to publish it"
    return None
