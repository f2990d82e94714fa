"""Alignment of the tensors of models of one architecture, and writing merged models from them.

A merged model is written tensor by tensor, each in the dtype that it has in the first model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raybge.merging.methods import Method, linear, slerp, ties
from raybge.merging.sources import (
    SourceModel,
    check_architectures,
    combine_settings,
    load_common_tokenizer,
    write_model_files,
)
from raybge.model.loaded_checks import check_finite, readable
from raybge.model.tensor_files import TensorSpec, mapped_tensors, write_tensors
from raybge.util.errors import UserError

_BUFFER = re.compile(r"\.(inv_freq|masked_bias)$")  # floating-point constants that old checkpoints contain
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Architecture:
    """Tensor naming of a transformers class.

    Args:
        name: name of the class.
        prefix: prefix of the backbone's tensor names in a model with a head.
        tied: for each tied tensor, without the prefix, the name of the tensor it shares memory with.
        backbone_only: merge the backbone alone, without a head and without a pooler that some models lack.
    """

    name: str
    prefix: str
    tied: Mapping[str, str]
    backbone_only: bool = False

    @classmethod
    def from_config(cls, auto: Any, config: Any, backbone_only: bool, trust_remote_code: bool = False) -> Architecture:
        """Read the naming from the class that a transformers auto class chooses for a configuration."""
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        start = f"{model.base_model_prefix}."
        tied = getattr(model, "all_tied_weights_keys", {})
        tied = {name.removeprefix(start): other.removeprefix(start) for name, other in tied.items()}
        return cls(type(model).__name__, model.base_model_prefix, tied, backbone_only)

    def canonical_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Return a checkpoint's tensors that belong to the model, keyed by canonical name.

        Args:
            tensors: tensors of a checkpoint by the names in its files.

        Returns:
            (name in the files, tensor) by a name that is the same for every checkpoint of this architecture; of tied
            tensors, the first.
        """
        start = f"{self.prefix}."
        has_head = self.backbone_only and any(name.startswith(start) for name in tensors)
        canonical: dict[str, tuple[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if not has_head or name.startswith(start):
                canonical.setdefault(self._canonical_name(name), (name, tensor))
        return canonical

    def is_optional(self, canonical_name: str) -> bool:
        """Return whether a tensor may be absent from some of the models: a pooler, which no embedding depends on."""
        return self.backbone_only and canonical_name.startswith("pooler.")

    def _canonical_name(self, name: str) -> str:
        name = name.removeprefix(f"{self.prefix}.")
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return self.tied.get(name, name)


@dataclass(frozen=True)
class AlignedTensor:
    """One tensor of all models under its name in the first model's files; a buffer only of the first, to be copied."""

    name: str
    tensors: list[Tensor]

    @property
    def slot(self) -> TensorSpec:
        """Name, dtype and shape of the merged tensor."""
        return TensorSpec(self.name, self.tensors[0].dtype, tuple(self.tensors[0].shape))


def align_tensors(
    names: Sequence[str], models: Sequence[Mapping[str, Tensor]], architecture: Architecture
) -> list[AlignedTensor]:
    """Match the tensors of all models by canonical name.

    Args:
        names: names of the models, for messages.
        models: for each model, the tensors of its files by name.
        architecture: the models' common architecture.

    Returns:
        Tensors in the order of the first model's. Buffers (integers and constants) are the first model's alone.

    Raises:
        UserError: one model has a tensor that another lacks, or their shapes differ.
    """
    first, *others = (architecture.canonical_tensors(tensors) for tensors in models)
    aligned = []
    for canonical, (name, tensor) in first.items():
        if not _is_mergeable(name, tensor):
            aligned.append(AlignedTensor(name, [tensor]))
            continue
        lacking = [other for other, tensors in zip(names[1:], others, strict=True) if canonical not in tensors]
        if lacking and architecture.is_optional(canonical):
            continue
        if lacking:
            raise _missing_tensor(lacking[0], canonical, names[0])
        tensors = [tensor, *(other[canonical][1] for other in others)]
        for other_name, each in zip(names, tensors, strict=True):
            if each.shape != tensor.shape:
                raise UserError(
                    f"the tensor {canonical} has shape {tuple(tensor.shape)} in {names[0]} and {tuple(each.shape)} in "
                    f"{other_name}: merging requires models of the same size and vocabulary"
                )
        aligned.append(AlignedTensor(name, tensors))
    for other_name, other in zip(names[1:], others, strict=True):
        for canonical, (name, tensor) in other.items():
            optional = architecture.is_optional(canonical)
            if canonical not in first and _is_mergeable(name, tensor) and not optional:
                raise _missing_tensor(names[0], canonical, other_name)
    return aligned


def _missing_tensor(name: str, tensor: str, other: str) -> UserError:
    return UserError(f"{name} lacks the tensor {tensor} of {other}: merging requires models of the same architecture")


def _is_mergeable(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _BUFFER.search(name)


class AlignedModels:
    """Source models of one architecture with aligned tensors, from which merged models are written.

    Args:
        names: folders or hub names.
        model_type: a key of `raybge.merging.sources.CLASSES`.
        base_model: model that the others were fine-tuned from, for TIES.
        cache_dir: cache of the hub's models.
        trust_remote_code: run code from the models' folders.

    Attributes:
        models: the source models, then the base model if there is one.
        settings: folder settings of a merged embedding model; None for other types.
        tensors: the aligned tensors.

    Raises:
        UserError: the models cannot be merged; the message states the difference.
    """

    def __init__(
        self,
        names: Sequence[str],
        model_type: str,
        base_model: str | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        import transformers

        flags = [(name, "--model_names_or_paths") for name in names]
        flags += [(base_model, "--base_model")] if base_model else []
        self.models = [SourceModel.open(name, model_type, flag, cache_dir) for name, flag in flags]
        check_architectures(self.models)
        is_encoder = model_type == "encoder"
        self.settings = combine_settings(self.models) if is_encoder else None
        first = self.models[0]
        auto = first.auto_class(model_type)
        with readable(f"transformers cannot load {first.name} as --model_type {model_type}"):
            config = transformers.AutoConfig.from_pretrained(first.folder, trust_remote_code=trust_remote_code)
            architecture = Architecture.from_config(auto, config, is_encoder, trust_remote_code)
        self._architecture = architecture.name
        self._width = config.get_text_config().hidden_size if is_encoder else 0
        self._tokenizer = load_common_tokenizer(self.models, trust_remote_code)
        files = [mapped_tensors(model.folder) for model in self.models]
        for model, tensors in zip(self.models, files, strict=True):
            check_finite(model.name, tensors)
        self.tensors = align_tensors([model.name for model in self.models], files, architecture)

    @property
    def bytes(self) -> int:
        """Size of a merged model's weights."""
        return sum(each.slot.bytes for each in self.tensors)

    def write(
        self, folder: Path, weights: Sequence[float], method: str, density: float, on_tensor: Callable[[], Any]
    ) -> None:
        """Write a merged model's folder except for its card.

        Memory: a few blocks of each model and, for TIES, one tensor in fp32, for models of any size.

        Args:
            folder: an existing folder.
            weights: one for each source model.
            method: "linear", "slerp" or "ties".
            density: of TIES.
            on_tensor: called after each tensor.
        """
        methods: dict[str, Method] = {
            "linear": partial(linear, weights=weights),
            "slerp": partial(slerp, weights=weights),
            "ties": partial(ties, weights=weights, density=density),
        }
        tensors_by_name = {each.name: each.tensors for each in self.tensors}

        def elements(name: str) -> Iterator[Tensor]:
            first, *others = tensors_by_name[name]
            merged = methods[method](tensors_by_name[name]) if others else [first.reshape(-1)]
            return (block_n.to(first.dtype) for block_n in merged)

        write_tensors(folder, [each.slot for each in self.tensors], elements, on_tensor)
        write_model_files(folder, self.models[0], self._architecture, self._tokenizer, self.settings, self._width)
