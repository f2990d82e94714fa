"""Parts of torch without a stability promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Prefix that torch.compile inserts into the names of a module's weights; torch has no function that removes it.
COMPILED_PREFIX = "_orig_mod."
# Classes and functions with which torch describes the tensors of a sharded checkpoint in its index, by module. The
# format has no specification: these are the names in the pickles that torch writes. Python 3.13 has PosixPath in
# pathlib._local.
SHARDED_INDEX_NAMES = {
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
# Classes in the files that DeepSpeed writes with torch.save, as of 0.19, by module: values without code of their own.
# DeepSpeed does not document the content of its files.
DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


def set_logged_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Set the learning rates that `scheduler.get_last_lr()` returns until the next step.

    A scheduler only updates them in `step()`, but transformers logs them before, when a run resumes with another
    learning rate.
    """
    scheduler._last_lr = list(rates)
