"""Conversion of a model in torch to files of ONNX or OpenVINO, in fp32 or int8, and the comparison of both.

OpenVINO's int8 is static: nncf measures the range of each activation on sample texts, with SmoothQuant
(https://arxiv.org/abs/2211.10438). ONNX's is dynamic: a range for each call, and one for each output channel of a
weight.

Letters in tensor names: N texts, B texts of a chunk, T tokens of its longest, D width of a vector.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from raybge.compat.openvino import import_without_telemetry
from raybge.model.backends.choice import ONNX, BackendChoice
from raybge.model.backends.sessions import INPUTS, OUTPUT
from raybge.model.embedding import EmbeddingModel
from raybge.model.loaded_checks import readable

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder

CALIBRATION_TEXTS, SAMPLE_TOKENS = 100, 256  # SAMPLE_TOKENS: of the longest text


class _TokenVectors(nn.Module):
    """The backbone as a function of two tensors that returns one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h_BTD: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return h_BTD


def convert(
    model: EmbeddingModel, name: str, choice: BackendChoice, folder: Path, token_ids: Sequence[np.ndarray]
) -> None:
    """Write a model as the file `choice.file` of a folder.

    Args:
        model: a model in fp32 on the CPU.
        name: its name, for messages.
        choice: backend and precision.
        folder: the folder.
        token_ids: ids of sample texts, the longest last.

    Raises:
        UserError: the model cannot be exported.
    """
    path = folder / choice.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with readable(f"the model {name} cannot be exported for --encode_backend {choice.backend}; use torch"):
        program = _program(model, token_ids)
        if choice.backend == ONNX:
            _write_onnx(program, path, choice.precision == "int8")
        else:
            _write_openvino(program, path, choice.precision == "int8", token_ids)


def sample_token_ids(encoder: Encoder, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of sample texts of all lengths that there are, the longest last.

    Args:
        encoder: the model.
        texts: sample texts.

    Returns:
        Ids of at most `CALIBRATION_TEXTS` texts, none without tokens.
    """
    length = min(encoder.passage_max_length, SAMPLE_TOKENS)
    token_ids = [np.array(ids, np.int64) for ids in encoder.tokenize(texts, length) if ids]
    token_ids.sort(key=len)
    return token_ids[:: -(-len(token_ids) // CALIBRATION_TEXTS) or 1]


def _program(model: EmbeddingModel, token_ids: Sequence[np.ndarray]) -> Any:
    """Return the graph of the backbone for any number of texts of any length."""
    inputs = model.pad([token_ids[-1], token_ids[-1][:2]], [0, 1])  # two texts, one of them padded
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        return torch.export.export(
            _TokenVectors(model.backbone).eval(), inputs, dynamic_shapes=dict.fromkeys(INPUTS, any_size), strict=False
        )


def _write_onnx(program: Any, path: Path, int8: bool) -> None:
    plain = path.with_name(".fp32.onnx") if int8 else path
    torch.onnx.export(
        program, dynamo=True, f=str(plain), input_names=list(INPUTS), output_names=[OUTPUT], external_data=False
    )
    if not int8:
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        plain,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,  # one range for a whole weight costs ten times the error
        reduce_range=path.stem.endswith("avx2"),  # whose products of 8 bits overflow
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    plain.unlink()


def _write_openvino(program: Any, path: Path, int8: bool, token_ids: Sequence[np.ndarray]) -> None:
    openvino = import_without_telemetry()
    model = openvino.convert_model(program)
    model.outputs[0].get_tensor().set_names({OUTPUT})
    if int8:
        nncf = import_without_telemetry("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        samples = [dict(zip(INPUTS, (ids[None], np.ones((1, len(ids)), np.int64)), strict=True)) for ids in token_ids]
        model = nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
    openvino.save_model(model, path, compress_to_fp16=False)
