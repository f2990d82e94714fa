"""The flags of transformers.TrainingArguments, read from the library's source.

Importing TrainingArguments takes seconds because it imports torch; `--help` and the check of flags do not need it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any

from raybge.cli.flag import Flag
from raybge.util.errors import UserError

GROUP = "transformers.TrainingArguments"
# Texts on the command line that have been, or also are, True or False.
OR_BOOL = ("fsdp", "include_num_input_tokens_seen", "resume_from_checkpoint", "trackio_static_space_id")


@cache
def training_argument_flags() -> dict[str, Flag]:
    """Read the flags of transformers.TrainingArguments.

    Returns:
        The flags by name.

    Raises:
        UserError: transformers is not installed.
    """
    from raybge.cli.options.training import NO_EFFECT, REFUSED

    return {
        name: Flag(
            name=name,
            kind=_kind(annotation),
            many="list[str]" in annotation,
            # output_dir has no useful default: the Trainer would write into the current folder.
            default=MISSING if name == "output_dir" else default,
            group=GROUP,
            help=text.replace("%%", "%"),
            refused=REFUSED.get(name),
            transformers=True,
            no_effect=NO_EFFECT.get(name),
            or_bool=name in OR_BOOL,
        )
        for name, annotation, default, text in _fields()
    }


def _fields() -> Iterator[tuple[str, str, Any, str]]:
    """Yield name, annotation, default and help text of each field of the class."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise UserError("transformers is not installed")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        keywords = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        metadata = keywords.get("metadata")
        entries: dict[Any, ast.expr] = {}
        if isinstance(metadata, ast.Dict):
            entries = dict(zip(map(_literal, metadata.keys), metadata.values, strict=True))
        text = _literal(entries.get("help")) or ""
        yield node.target.id, ast.unparse(node.annotation), _literal(keywords.get("default")), text


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _kind(annotation: str) -> str:
    if "dict" in annotation:
        return "json"
    kinds = [k for k in ("str", "bool", "float", "int") if k in annotation.replace("IntervalStrategy", "")]
    return kinds[0] if kinds else "str"
