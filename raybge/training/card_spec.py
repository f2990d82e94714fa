"""Spec of the model card: what follows from the flags and from the base model's own card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raybge.cli.options import LoopOptions
from raybge.cli.options.common import DATA, LORA, OBJECTIVE
from raybge.cli.parser import changed_values, declared_flags
from raybge.model.origin import ModelOrigin
from raybge.util.errors import UserError
from raybge.util.filesystem import last_part

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


# They name machines and folders of those who trained, not what was trained.
_NOT_PUBLISHED = {"address", "storage_path", "cache_path", "cache_dir", "logging_dir", "run_name", "config"}


@dataclass(frozen=True)
class CardSpec:
    """Fields of the model card.

    Args:
        base: the base model; None for a model trained from scratch.
        license: --license, or that of the base model; None if neither is known.
        languages: --language, or those of the base model.
        flags: flags that are not at their defaults, without secrets; a local model without its folder.
        hyperparameters: raybge's own flags that the weights depend on, with their defaults.
    """

    base: ModelOrigin | None
    license: str | None
    languages: tuple[str, ...]
    flags: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]

    @classmethod
    def from_options(cls, options: LoopOptions) -> CardSpec:
        """Read the flags, and the base model's card.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a license or language that is not an identifier of the hub.
        """
        for name in [options.license] if options.license else []:
            if not _LICENSE.fullmatch(name):
                raise UserError(
                    f"--license {name}: expected an identifier of the hub, such as apache-2.0, mit, cc-by-4.0 or other"
                )
        for name in options.language or []:
            if not _LANGUAGE.fullmatch(name):
                raise UserError(f"--language {name}: expected ISO 639 codes such as en or deu, code, or multilingual")
        model = options.model_name_or_path
        base = None if model is None else ModelOrigin.of(model, options.cache_dir, options.token)
        licenses = [options.license, base.license if base else None]
        languages = options.language or (base.languages if base else ())
        return cls(
            base=base,
            license=next((each for each in licenses if each and _LICENSE.fullmatch(each)), None),
            languages=tuple(each for each in languages if _LANGUAGE.fullmatch(each)),
            flags={
                name: _without_folder(value)
                for name, value in changed_values(options).items()
                if name not in _NOT_PUBLISHED
            },
            hyperparameters=_hyperparameters(options),
        )


def _without_folder(value: Any) -> Any:
    """Return the last part of a local folder, whose path may have the form of a hub name; other values unchanged."""
    return last_part(os.path.abspath(value)) if isinstance(value, str) and os.path.isdir(value) else value


def _hyperparameters(options: LoopOptions) -> dict[str, Any]:
    groups = {DATA, OBJECTIVE, *([LORA] if getattr(options, "use_lora", False) else [])}
    return {
        name: getattr(options, name)
        for name, flag in declared_flags(type(options)).items()
        if flag.group in groups and not flag.transformers and not flag.refused and name != "train_data"
    } | {"warmup_ratio": options.warmup_ratio}
