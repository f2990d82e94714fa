"""Low-rank adapters: which layers get them, and their files (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

peft does the arithmetic. The adapters are put into the transformers model itself, so that whatever runs the model
need not know of them. Nothing here imports torch or peft before it is used: the command checks its flags with this.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raybge.util.errors import UserError, first_line

_NAME = "default"  # peft's own name of the only adapter


@dataclass(frozen=True)
class Lora:
    """Adapters to train, while the model's own weights stay as they are.

    Args:
        rank: of the two factors whose product is added to a layer's weight.
        alpha: the product is scaled by alpha / rank.
        dropout: of what goes into the adapters.
        target_modules: names of linear layers, or ends of names ("query", "attention.output.dense"); None: all of
            them, but for heads that give the embedding nothing.

    Raises UserError for values that cannot be, or where peft is not installed.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_peft("--use_lora")
        if self.rank < 1:
            raise UserError(f"--lora_rank must be at least 1, found {self.rank}")
        if self.alpha <= 0:
            raise UserError(f"--lora_alpha must be above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora_dropout must be at least 0 and below 1, found {self.dropout}")

    def apply(self, backbone: Any) -> Any:
        """Put adapters into a transformers model, in place, and freeze all else; returns the model.

        A new adapter adds nothing: its second factor is zero. Raises UserError for a target that is no linear layer
        of the model.
        """
        from peft import LoraConfig, TaskType

        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._targets(backbone),
        )
        backbone.add_adapter(config, _NAME)
        # a set until here, which would be written in another order each time
        config.target_modules = sorted(config.target_modules or ())
        return backbone

    def _targets(self, backbone: Any) -> list[str]:
        """Full names of the layers that get adapters."""
        import torch
        from transformers.pytorch_utils import Conv1D

        # a pooler gives the embedding nothing, so data-parallel training would wait for its adapters' gradients
        linear = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name.split(".")[0] != "pooler"
        ]
        if self.target_modules is None:
            return linear
        found = {end: [n for n in linear if f".{n}".endswith(f".{end}")] for end in self.target_modules}
        unknown = [end for end, names in found.items() if not names]
        if unknown or not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(
                f"--target_modules {' '.join(unknown)}: this model has no linear layer of that name; it has {known}"
            )
        return sorted({name for names in found.values() for name in names})


def require_peft(what: str) -> None:
    """Stop with a UserError that says what needs peft, where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} needs the package peft: pip install 'raybge[lora]'")


def merge_adapters(backbone: Any, folder: str, options: Mapping[str, Any]) -> Any:
    """The model with a folder's adapters added to its weights: a plain transformers model, in fp32 as good as exact.

    `options` say where on the hub the folder lies (token, cache_dir, subfolder). Raises UserError when the adapters
    do not fit the model.
    """
    require_peft(f"the model {folder}, which holds adapters,")
    from peft import PeftModel

    wants_gradient = {name: p.requires_grad for name, p in backbone.named_parameters()}
    try:
        whole = PeftModel.from_pretrained(backbone, folder, **options).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        # AttributeError: no kind that adds up; UnpicklingError: a .bin that holds more than weights
        raise UserError(f"the adapters of {folder} do not fit its base model: {first_line(error)}") from error
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(wants_gradient[name])  # peft has frozen them all
    return whole


def merged_weights(backbone: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the plain model that a model with adapters amounts to, by their names there.

    `state_dict` holds the weights of `backbone`, all of them whole, whatever workers hold of it in memory.
    """
    plain = {name.replace(".base_layer.", "."): w for name, w in state_dict.items() if ".lora_" not in name}
    for name, layer in backbone.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = plain[f"{name}.weight"]
        a, b = (state_dict[f"{name}.lora_{side}.{_NAME}.weight"].float() for side in "AB")
        product = layer.scaling[_NAME] * (b @ a)
        # GPT-2's layers keep their weights transposed
        plain[f"{name}.weight"] = (weight + (product.T if layer.fan_in_fan_out else product)).to(weight.dtype)
    return plain


def load_adapters(backbone: Any, folder: str, options: Mapping[str, Any]) -> None:
    """Copy a folder's adapters into those that `Lora.apply` made, in place; all of them, no other, of equal size."""
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        weights = load_peft_weights(folder, device="cpu", **options)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"the adapters of {folder} do not load: {first_line(error)}") from error
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    own = get_peft_model_state_dict(backbone, adapter_name=_NAME)
    sizes, found = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, weights))
    if sizes != found:
        differ = sorted(name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name))
        raise UserError(
            f"the adapters of {folder} are not those of --lora_rank and --target_modules: they differ in "
            f"{', '.join(differ[:3])} ({len(differ)} in all)"
        )
    set_peft_model_state_dict(backbone, weights, adapter_name=_NAME)


def check_adapter_config(lora: Lora, folder: str, said: Mapping[str, Any]) -> None:
    """Adapters that are trained further keep their kind and scale: `said` is their adapter_config.json."""
    for name, wanted, found in (("rank", lora.rank, said.get("r")), ("alpha", lora.alpha, said.get("lora_alpha"))):
        if wanted != found:
            raise UserError(
                f"--lora_{name} {wanted}: the adapters of {folder}, which are to be trained further, have {found}"
            )
    for name in ("use_rslora", "alpha_pattern"):
        if said.get(name):
            raise UserError(f"the adapters of {folder} have {name}: raybge does not train such further")
