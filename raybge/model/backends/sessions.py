"""Exported models in memory: a network that runs in ONNX Runtime or OpenVINO in place of torch.

Letters in tensor names: B texts of a chunk, T tokens of its longest, D width of a vector.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raybge.compat.openvino import import_without_telemetry
from raybge.model.backends.choice import ONNX
from raybge.model.loaded_checks import readable
from raybge.model.precision import cpu_gains_by_bf16

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "last_hidden_state"  # as sentence-transformers calls them


class ExportedBackbone(nn.Module):
    """Backbone of an `EmbeddingModel` whose token vectors an exported model computes.

    Args:
        run: computes h_BTD from ids_BT and mask_BT.
        network: the transformers model on the meta device: its modules state positions, width and kind.
    """

    def __init__(self, run: Run, network: nn.Module) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # its device is the model's
        self.network = network
        self.config: Any = network.config
        self._run = run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Return the token vectors as transformers does.

        Args:
            input_ids: ids_BT.
            attention_mask: mask_BT.

        Returns:
            An object with `last_hidden_state`, h_BTD in fp32.
        """
        return SimpleNamespace(last_hidden_state=torch.from_numpy(self._run(input_ids.numpy(), attention_mask.numpy())))

    def get_input_embeddings(self) -> Any:
        """Return the table of the network, whose number of rows is checked."""
        network: Any = self.network
        return network.get_input_embeddings()

    def _apply(self, *arguments: Any, **options: Any) -> ExportedBackbone:
        """Stay as it is: the weights are in the session, and those of the meta device cannot be moved."""
        return self


def open_session(path: str, backend: str, precision: str, threads: int) -> Run:
    """Load an exported model.

    Args:
        path: its .onnx or .xml file.
        backend: "onnx" or "openvino".
        precision: "fp32", "bf16" or "int8"; bf16 is fp32 on a CPU that does not gain by it.
        threads: threads of each call.

    Returns:
        A function of (ids_BT, mask_BT), both int64, that returns h_BTD in fp32.

    Raises:
        UserError: the file does not load.
    """
    with readable(f"the exported model {path} does not load"):
        return _onnx(path, threads) if backend == ONNX else _openvino(path, precision, threads)


def _onnx(path: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # threads that wait actively would take the cores of other actors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids_BT, mask_BT: session.run([OUTPUT], dict(zip(INPUTS, (ids_BT, mask_BT), strict=True)))[0]


def _openvino(path: str, precision: str, threads: int) -> Run:
    openvino = import_without_telemetry()
    # Not for int8: with the rest in bf16, OpenVINO 2026.4 gives small models vectors that differ with the padding.
    half = precision == "bf16" and cpu_gains_by_bf16()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # every actor would bind its threads to the same cores
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    lock = threading.Lock()  # a request runs once at a time

    def run(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        with lock:
            h_BTD: np.ndarray = request.infer(dict(zip(INPUTS, (ids_BT, mask_BT), strict=True)))[OUTPUT]
        return h_BTD  # a copy of the request's memory

    return run
