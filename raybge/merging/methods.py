"""Mixing models of one architecture: one tensor at a time of all, whatever their size.

The weighted sum is LM-Cocktail's, https://arxiv.org/abs/2311.13534. Every tensor is gone through in blocks, in fp32 or
what is wider, and the result is written in the dtype that it has in the first model.

Letters in tensor names: N numbers of a tensor, n numbers of a block of it, M models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raybge.merging.sources import Ingredient, check_alike, check_vocabularies, joined_settings, write_surroundings
from raybge.model.tensor_files import Slot, mapped_tensors, write_tensors
from raybge.util.errors import UserError, first_line

BLOCK = 1 << 22  # numbers of a tensor that are handled at a time
_BUFFER = re.compile(r"\.(inv_freq|masked_bias)$")  # constants in floats, which old files carry
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


# --- which tensors belong together ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What a transformers class says of the names of its tensors.

    Args:
        name: of the class.
        prefix: what comes before the names of a backbone's tensors where it has a head.
        tied: by a tensor's name, without the prefix, the name of the tensor that it is too.
        bare: the backbone alone is wanted: a head is no part of it, and neither is a pooler that not all have.
    """

    name: str
    prefix: str
    tied: Mapping[str, str]
    bare: bool = False

    @classmethod
    def of(cls, auto: Any, config: Any, bare: bool, trust_remote_code: bool = False) -> Architecture:
        """That of the class that the `auto` class of transformers takes for a configuration."""
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        start = f"{model.base_model_prefix}."
        tied = getattr(model, "all_tied_weights_keys", {})
        tied = {name.removeprefix(start): other.removeprefix(start) for name, other in tied.items()}
        return cls(type(model).__name__, model.base_model_prefix, tied, bare)

    def tensors(self, found: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """The tensors of a file that are part of the model, with their names in the file, by the name that they have
        in any file of this architecture; of tied ones the first.
        """
        start = f"{self.prefix}."
        headed = self.bare and any(name.startswith(start) for name in found)
        parts: dict[str, tuple[str, Tensor]] = {}
        for name, tensor in found.items():
            if not headed or name.startswith(start):
                parts.setdefault(self._plain(name), (name, tensor))
        return parts

    def _plain(self, name: str) -> str:
        name = name.removeprefix(f"{self.prefix}.")
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return self.tied.get(name, name)


@dataclass(frozen=True)
class Aligned:
    """One tensor in all models, by its name in the first one's file; a buffer is there once, to be copied."""

    name: str
    tensors: list[Tensor]

    @property
    def slot(self) -> Slot:
        return Slot(self.name, self.tensors[0].dtype, tuple(self.tensors[0].shape))


def align(names: Sequence[str], models: Sequence[Mapping[str, Tensor]], architecture: Architecture) -> list[Aligned]:
    """The tensors that all models have, in the first one's order.

    Args:
        names: of the models, for messages.
        models: the tensors of each one's files.

    Buffers (whole numbers, and constants) are the first model's. UserError, naming the tensor, where one has it and
    another has not, or where their shapes differ.
    """
    first, *others = (architecture.tensors(found) for found in models)
    aligned = []
    for plain, (name, tensor) in first.items():
        if not _is_mixed(name, tensor):
            aligned.append(Aligned(name, [tensor]))
            continue
        lacking = [other for other, parts in zip(names[1:], others, strict=True) if plain not in parts]
        if lacking and architecture.bare and plain.startswith("pooler."):
            continue  # it gives an embedding nothing
        if lacking:
            raise UserError(f"{lacking[0]} lacks the tensor {plain}, which {names[0]} has: they are not of one kind")
        tensors = [tensor, *(parts[plain][1] for parts in others)]
        for other, each in zip(names, tensors, strict=True):
            if each.shape != tensor.shape:
                raise UserError(
                    f"the tensor {plain} is {tuple(tensor.shape)} in {names[0]} and {tuple(each.shape)} in {other}: "
                    "only models of one size and one vocabulary can be mixed"
                )
        aligned.append(Aligned(name, tensors))
    for other, parts in zip(names[1:], others, strict=True):
        for plain, (name, tensor) in parts.items():
            spare = architecture.bare and plain.startswith("pooler.")
            if plain not in first and _is_mixed(name, tensor) and not spare:
                raise UserError(f"{names[0]} lacks the tensor {plain}, which {other} has: they are not of one kind")
    return aligned


def _is_mixed(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _BUFFER.search(name)


# --- arithmetic -------------------------------------------------------------------------------------------------------

# A tensor of all models to the numbers of their mixture, block by block, in fp32 or what is wider.
Method = Callable[[Sequence[Tensor]], Iterator[Tensor]]


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """The weighted sum. A model of weight 0 is not looked at, so that weights 1 and 0 give a tensor bit for bit."""
    used = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    for blocks in _blocks([tensor for tensor, _ in used]):
        total_n = blocks[0] * used[0][1]
        for block_n, (_, weight) in zip(blocks[1:], used[1:], strict=True):
            total_n.add_(block_n, alpha=weight)
        yield total_n


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """Two tensors mixed along the arc between their directions: spherical linear interpolation, Shoemake 1985,
    https://doi.org/10.1145/325165.325242.
    """
    products = [[torch.dot(a, b) for a, b in ((x, y), (x, x), (y, y))] for x, y in _blocks(tensors, torch.float64)]
    dot, first, second = torch.tensor(products, dtype=torch.float64).reshape(-1, 3).sum(dim=0).tolist()
    length = math.sqrt(first * second)
    angle = math.acos(max(-1.0, min(1.0, dot / length))) if length else 0.0
    if math.sin(angle) > 1e-6:  # else there is no arc, or no one arc
        weights = [math.sin(weight * angle) / math.sin(angle) for weight in weights]
    return linear(tensors, weights)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Iterator[Tensor]:
    """TIES-Merging, https://arxiv.org/abs/2306.01708: a base model, the last of the tensors, and what the others
    changed of it.

    Of each tensor's changes the share `density` that is largest is kept; for each number the sign that weighs more is
    elected, and the changes of that sign are averaged by the models' weights.
    """
    *tuned, base = tensors
    limit_M1 = torch.tensor([[_magnitude(tensor, base, density)] for tensor in tuned])
    weight_M1 = torch.tensor(weights)[:, None]
    for *blocks, base_n in _blocks(tensors):
        change_Mn = torch.stack([block_n - base_n for block_n in blocks])
        change_Mn *= change_Mn.abs() >= limit_M1
        weighed_Mn = change_Mn * weight_M1
        agrees_Mn = (change_Mn.sign() == weighed_Mn.sum(dim=0).sign()) & (change_Mn != 0)
        total_n, weight_n = (weighed_Mn * agrees_Mn).sum(dim=0), (weight_M1 * agrees_Mn).sum(dim=0)
        yield base_n + torch.where(weight_n > 0, total_n / weight_n, 0.0)


def _magnitude(tensor: Tensor, base: Tensor, density: float) -> float:
    """The least change that is among the share `density` of largest ones."""
    count = tensor.numel()
    if not count:
        return 0.0
    change_N = torch.empty(count)
    start = 0
    for block_n, base_n in _blocks([tensor, base]):
        change_N[start : start + len(block_n)] = (block_n - base_n).abs()
        start += len(block_n)
    place = count - max(1, int(density * count))
    values_N = change_N.numpy()
    values_N.partition(place)  # in place: torch.kthvalue would hold two tensors more
    return float(values_N[place])


def _blocks(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Iterator[list[Tensor]]:
    """The tensors side by side, BLOCK numbers at a time, in fp32 or what is wider; they may be the files' own pages, so
    nothing may be written into them.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), BLOCK):
        parts = [tensor[start : start + BLOCK] for tensor in flat]
        yield [part.to(dtype or torch.promote_types(part.dtype, torch.float32)) for part in parts]


# --- a mixture --------------------------------------------------------------------------------------------------------


class Cocktail:
    """Models of one architecture, opened and compared: what is needed to write mixtures of them.

    Args:
        names: folders, or names on the hub.
        model_type: a key of CLASSES.
        base_model: what the others were fine-tuned from, for TIES.

    Raises UserError for models that cannot be mixed, with what differs.
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

        given = [(name, "--model_names_or_paths") for name in names]
        given += [(base_model, "--base_model")] if base_model else []
        self.models = [Ingredient.find(name, model_type, flag, cache_dir) for name, flag in given]
        check_alike(self.models)
        encoder = model_type == "encoder"
        self.settings = joined_settings(self.models) if encoder else None
        first = self.models[0]
        try:
            config = transformers.AutoConfig.from_pretrained(first.folder, trust_remote_code=trust_remote_code)
            auto = first.auto_class(model_type)
            architecture = Architecture.of(auto, config, encoder, trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{first.name} is no {model_type} that transformers opens: {first_line(error)}") from error
        self._architecture = architecture.name
        self._width = config.get_text_config().hidden_size if encoder else 0
        self._tokenizer = check_vocabularies(self.models, trust_remote_code)
        files = [mapped_tensors(model.folder) for model in self.models]
        self.aligned = align([model.name for model in self.models], files, architecture)

    @property
    def bytes(self) -> int:
        """Of a mixture's weights."""
        return sum(each.slot.bytes for each in self.aligned)

    def write(
        self, folder: Path, weights: Sequence[float], method: str, density: float, done: Callable[[], Any]
    ) -> None:
        """Write a mixture's whole folder but for its card; `done` is called after each tensor.

        Memory: some blocks of each model, and for TIES one tensor in fp32, whatever the models' size.
        """
        methods: dict[str, Method] = {
            "linear": partial(linear, weights=weights),
            "slerp": partial(slerp, weights=weights),
            "ties": partial(ties, weights=weights, density=density),
        }
        by_name = {each.name: each.tensors for each in self.aligned}

        def numbers(name: str) -> Iterator[Tensor]:
            first, *others = by_name[name]
            mixed = methods[method](by_name[name]) if others else [first.reshape(-1)]
            return (block_n.to(first.dtype) for block_n in mixed)

        write_tensors(folder, [each.slot for each in self.aligned], numbers, done)
        write_surroundings(folder, self.models[0], self._architecture, self._tokenizer, self.settings, self._width)
