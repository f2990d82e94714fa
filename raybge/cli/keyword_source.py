"""Source of `options/*_keywords.py`: the keyword arguments of the Python functions, for type checkers and editors.

`make signatures` writes these files.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybge.cli import options
from raybge.cli.flag import Flag
from raybge.cli.signatures import accepted_flags, keyword_type

FOLDER = Path(options.__file__).parent
_HEADER = '''"""Types and defaults of keyword arguments: `make signatures` writes this file from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Required, TypedDict
'''


@dataclass(frozen=True)
class KeywordClass:
    """A generated TypedDict.

    Args:
        name: name of the class.
        function: function that has the arguments.
        options_class: options whose flags it holds.
        base: class of the same file whose flags it inherits.
        omitted: flags that it does not hold.
        transformers: hold the flags of transformers.TrainingArguments, and no others.
    """

    name: str
    function: str
    options_class: type
    base: str | None = None
    omitted: tuple[str, ...] = ()
    transformers: bool = False


# Arguments of `mix_models` and of `mix_models_with_data` that are in the functions' own signatures.
_MIXED = ("model_names_or_paths", "model_type", "weights", "output_path")
_MIXED_WITH_DATA = ("example_data", "temperature", "batch_size", "max_input_length", "neg_number")

FILES = {
    "training_keywords.py": (
        KeywordClass("TrainingArgumentKeywords", "transformers.TrainingArguments", options.LoopOptions, None, (), True),
        KeywordClass("TrainKeywords", "raybge.finetune", options.TrainOptions, "TrainingArgumentKeywords"),
        KeywordClass("TuneKeywords", "raybge.tune_finetune", options.TuneOptions, "TrainKeywords"),
        KeywordClass(
            "PretrainKeywords", "raybge.pretrain_retromae", options.PretrainOptions, "TrainingArgumentKeywords"
        ),
    ),
    "searching_keywords.py": (
        KeywordClass("MineKeywords", "raybge.mine_hard_negatives", options.MineOptions),
        KeywordClass("EvaluateKeywords", "raybge.evaluate_retrieval", options.EvaluateOptions),
        KeywordClass(
            "EncodeDatasetKeywords",
            "raybge.encode_dataset with a Ray Dataset",
            options.EncodeOptions,
            omitted=options.FILE_FLAGS,
        ),
        KeywordClass("EncodeKeywords", "raybge.encode_dataset", options.EncodeOptions, "EncodeDatasetKeywords"),
    ),
    "exporting_keywords.py": (KeywordClass("ExportKeywords", "raybge.export_model", options.ExportOptions),),
    "merging_keywords.py": (
        KeywordClass(
            "MixWithDataKeywords",
            "raybge.mix_models_with_data",
            options.MergeOptions,
            omitted=(*_MIXED, *_MIXED_WITH_DATA),
        ),
        KeywordClass("MixKeywords", "raybge.mix_models", options.MergeOptions, "MixWithDataKeywords", _MIXED),
    ),
}


def source(classes: tuple[KeywordClass, ...]) -> str:
    """Return the content of the file with these classes."""
    names: dict[str, set[str]] = {}
    parts: list[str] = []
    for each in classes:
        inherited = names[each.base] if each.base else set()
        flags = [
            f
            for f in accepted_flags(each.options_class)
            if f.name not in inherited and f.name not in each.omitted and (f.transformers or not each.transformers)
        ]
        names[each.name] = inherited | {f.name for f in flags}
        head = f"class {each.name}({each.base or 'TypedDict'}, total=False):"
        parts.append("\n".join([head, f'    """Keyword arguments of {each.function}."""', "", *map(_line, flags)]))
    return _imports("\n\n\n".join(parts)) + "\n\n" + "\n\n\n".join(parts) + "\n"


def _imports(text: str) -> str:
    """Return the head of the file with the names that the text uses."""
    names = [name for name in ("Any", "Literal", "Required", "TypedDict") if re.search(rf"\b{name}\b", text)]
    return re.sub(r"(?<=import )Any,.*", ", ".join(names), _HEADER)


def _line(f: Flag) -> str:
    text = _type_text(keyword_type(f))
    if f.required:
        return f"    {f.name}: Required[{text}]"
    return f"    {f.name}: {text}" + ("" if f.default is None else f"  # {f.default!r}")


def _type_text(annotation: Any) -> str:
    text = re.sub(r"\b(?:collections\.abc|pathlib|typing)\.", "", inspect.formatannotation(annotation))
    return text.replace("'", '"')


if __name__ == "__main__":
    for file, classes in FILES.items():
        (FOLDER / file).write_text(source(classes), encoding="utf-8")
