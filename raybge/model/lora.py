"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): their layers and their files.

peft does the arithmetic. The adapters are inserted into the transformers model itself, so code that runs the model is
the same with and without them. torch and peft are imported on use only: commands check their flags with this module.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from raybge.util.errors import UserError

_NAME = "default"  # peft's name of a single adapter


@dataclass(frozen=True)
class Lora:
    """Adapters to train while the model's own weights are frozen.

    Args:
        rank: rank of the product of two factors that is added to a layer's weight.
        alpha: the product is scaled by alpha / rank.
        dropout: dropout probability of the adapters' input.
        target_modules: names of linear layers, or ends of names ("query", "attention.output.dense"); None: all linear
            layers except heads that do not contribute to the embedding.

    Raises:
        UserError: a value out of range, or peft is not installed.
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
        """Insert adapters into a transformers model, in place, and freeze all other weights.

        A new adapter does not change the model's output: its second factor is zero.

        Args:
            backbone: a transformers model.

        Returns:
            The model.

        Raises:
            UserError: a target is no linear layer of the model.
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
        # peft makes a set of it, which would be written in another order each time
        config.target_modules = sorted(config.target_modules or ())
        return backbone

    def _targets(self, backbone: Any) -> list[str]:
        """Return the full names of the layers that get adapters."""
        import torch
        from transformers.pytorch_utils import Conv1D

        # a pooler does not contribute to the embedding: data-parallel training would wait for its adapters' gradients
        linear = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name.split(".")[0] != "pooler"
        ]
        if self.target_modules is None:
            return linear
        matches = {end: [n for n in linear if f".{n}".endswith(f".{end}")] for end in self.target_modules}
        unknown = [end for end, names in matches.items() if not names]
        if unknown or not matches:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(
                f"--target_modules {' '.join(unknown)}: this model has no such linear layer; expected one of {known}"
            )
        return sorted({name for names in matches.values() for name in names})


def require_peft(subject: str) -> None:
    """Raise UserError if peft, which `subject` requires, is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{subject} requires the package peft: pip install 'raybge[lora]'")


def merge_adapters(backbone: Any, folder: str, options: Mapping[str, Any]) -> Any:
    """Add a folder's adapters to the weights of their base model.

    Args:
        backbone: the base model, in fp32, in which the sum is practically exact.
        folder: folder or hub name of the adapters.
        options: where to find a folder on the hub: `token`, `cache_dir`, `subfolder`.

    Returns:
        A plain transformers model.

    Raises:
        UserError: the adapters do not fit the model.
    """
    require_peft(f"the model {folder}, which holds adapters,")
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights

    from raybge.model.loaded_checks import check_finite, readable

    wants_gradient = {name: p.requires_grad for name, p in backbone.named_parameters()}
    with readable(f"the adapters of {folder} do not fit its base model"):
        model = PeftModel.from_pretrained(backbone, folder, **options)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        _check_adapter_names(folder, expected, load_peft_weights(folder, device="cpu", **options).keys())
        whole = model.merge_and_unload()
    check_finite(folder, whole.state_dict())
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(wants_gradient[name])  # peft has frozen all of them
    return whole


def _check_adapter_names(folder: str, expected: Collection[str], names: Collection[str]) -> None:
    """Raise UserError if a file of adapters lacks some of its configuration's, or has others: peft only warns."""
    unused = {name for name in names if ".lora_" in name} - set(expected)
    if differ := sorted((set(expected) - set(names)) | unused):
        raise UserError(
            f"the adapters of {folder} do not fit its base model and adapter_config.json: they differ in "
            f"{', '.join(differ[:3])} ({len(differ)} in total)"
        )


def merged_weights(backbone: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the weights of the plain model that a model with adapters is equivalent to.

    Args:
        backbone: a model with adapters.
        state_dict: its weights, unsharded, even if the workers hold shards in memory.

    Returns:
        Weights by their names in the plain model.
    """
    plain = {name.replace(".base_layer.", "."): w for name, w in state_dict.items() if ".lora_" not in name}
    for name, layer in backbone.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = plain[f"{name}.weight"]
        a, b = (state_dict[f"{name}.lora_{side}.{_NAME}.weight"].float() for side in "AB")
        product = layer.scaling[_NAME] * (b @ a)
        # GPT-2's layers store their weights transposed
        plain[f"{name}.weight"] = (weight + (product.T if layer.fan_in_fan_out else product)).to(weight.dtype)
    return plain


def load_adapters(backbone: Any, folder: str, options: Mapping[str, Any]) -> None:
    """Copy a folder's adapters into those that `Lora.apply` inserted, in place; names and shapes have to be equal."""
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    from raybge.model.loaded_checks import check_finite, readable

    with readable(f"the adapters of {folder} do not load"):
        weights = load_peft_weights(folder, device="cpu", **options)
    check_finite(folder, weights)
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    own = get_peft_model_state_dict(backbone, adapter_name=_NAME)
    expected, shapes = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, weights))
    if expected != shapes:
        differ = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise UserError(
            f"the adapters of {folder} do not match --lora_rank and --target_modules: they differ in "
            f"{', '.join(differ[:3])} ({len(differ)} in total)"
        )
    set_peft_model_state_dict(backbone, weights, adapter_name=_NAME)


def check_adapter_config(lora: Lora, folder: str, config: Mapping[str, Any]) -> None:
    """Raise UserError if adapters that are trained further would change their kind or scale.

    Args:
        lora: adapters as the flags describe them.
        folder: folder of the adapters.
        config: its adapter_config.json.
    """
    for name, value, saved in (("rank", lora.rank, config.get("r")), ("alpha", lora.alpha, config.get("lora_alpha"))):
        if value != saved:
            raise UserError(
                f"--lora_{name} {value}: the adapters of {folder} have {saved}; training them further requires the "
                "same value"
            )
    for name in ("use_rslora", "alpha_pattern"):
        if config.get(name):
            raise UserError(f"the adapters of {folder} have {name}: training them further is not supported")
