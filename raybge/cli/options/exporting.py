"""Flags of `raybge.export`."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.flag import flag
from raybge.cli.options.common import DATA, MODEL, MODEL_NAMES, RUN, ModelOptions


@dataclass(kw_only=True)
class ExportOptions(ModelOptions):
    """Export a model to ONNX or OpenVINO, in fp32 or int8, as a folder that sentence-transformers opens too."""

    model_name_or_path: str = flag(..., MODEL, "embedding model: folder or hub name", aliases=MODEL_NAMES)
    output_dir: str = flag(..., RUN, "folder for the model with its exported file")
    encode_backend: str = flag("openvino", MODEL, "library that will run the model", choices=("onnx", "openvino"))
    encode_precision: str = flag(
        "int8", MODEL, "precision of the file; OpenVINO computes bf16 from fp32's", choices=("fp32", "int8")
    )
    sample_data: list[str] | None = flag(
        None,
        DATA,
        "passages {text} like those that will be encoded: int8 is calibrated on some of them; default: English "
        "docstrings of Python's library",
    )
    accept_any_text: bool = flag(
        False, DATA, 'take "None", "nan" or "[\'a\', \'b\']" for texts: without it rows with such texts are invalid'
    )
    overwrite_output_dir: bool = flag(False, RUN, "replace an existing output_dir")
    config: str | None = flag(None, RUN, "YAML file of flags; flags on the command line override it")
    verbose: bool = flag(False, RUN, "show the messages of other libraries")
