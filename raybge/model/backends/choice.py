"""Choice of a backend and a precision for encoding, and the checks of both. Nothing here imports torch.

What is fastest differs between CPUs; benchmarks/encoding.py measures it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass

from raybge.util.errors import UserError

TORCH, ONNX, OPENVINO = BACKENDS = ("torch", "onnx", "openvino")
PRECISIONS = ("fp32", "bf16", "int8")
# Modules that an extra of raybge's name installs: those that run a model, then those that export one.
_MODULES = {ONNX: ("onnxruntime", "onnx", "onnxscript"), OPENVINO: ("openvino", "nncf")}


@dataclass(frozen=True)
class BackendChoice:
    """Backend and precision of a model that is not trained.

    Args:
        backend: one of BACKENDS.
        precision: one of PRECISIONS; None for torch where --use_fp16 decides.
    """

    backend: str = TORCH
    precision: str | None = None

    @classmethod
    def of(cls, backend: str, precision: str | None, use_bf16: bool | None) -> BackendChoice:
        """Resolve the flags: --use_bf16 is short for --encode_precision bf16.

        Args:
            backend: --encode_backend.
            precision: --encode_precision; None: bf16 with --use_bf16, else fp32 or, for torch, as --use_fp16 says.
            use_bf16: --use_bf16.

        Returns:
            The choice.

        Raises:
            UserError: an unknown value, flags that contradict each other, a precision that the backend lacks, or a
                package that is not installed.
        """
        for name, value, choices in (
            ("encode_backend", backend, BACKENDS),
            ("encode_precision", precision, (*PRECISIONS, None)),
        ):
            if value not in choices:
                accepted = ", ".join(filter(None, choices))
                raise UserError(f"--{name} takes one of {accepted}, found «{value}»")
        if use_bf16 and precision not in (None, "bf16"):
            raise UserError(
                f"--encode_precision {precision} and --use_bf16 contradict each other: --use_bf16 is short for "
                "--encode_precision bf16; omit one of the two"
            )
        precision = "bf16" if use_bf16 else precision
        if backend == TORCH:
            if precision == "int8":
                raise UserError(
                    "--encode_precision int8 requires --encode_backend openvino or onnx: torch's own int8 is slower "
                    "than its bf16, and less exact"
                )
            return cls(backend, precision)
        if backend == ONNX and precision == "bf16":
            raise UserError(
                "--encode_precision bf16 requires --encode_backend openvino or torch: ONNX Runtime has no bf16 on CPUs"
            )
        choice = cls(backend, precision or "fp32")
        choice.check_installed(_MODULES[backend][:1])
        return choice

    def __str__(self) -> str:
        return f"backend={self.backend!r}, precision={self.precision!r}"

    @property
    def exported(self) -> bool:
        """True if the model is exported, and runs outside of torch."""
        return self.backend != TORCH

    def half_precision(self, use_fp16: bool | None) -> tuple[bool | None, bool]:
        """Return `use_fp16` and `use_bf16` of a model in torch: the precision, if there is one, decides.

        Args:
            use_fp16: --use_fp16; None: fp16 on GPUs.

        Returns:
            Both.
        """
        return (False if self.precision == "fp32" else use_fp16), self.precision == "bf16"

    @property
    def file(self) -> str:
        """Path of the exported model in a folder, as sentence-transformers names it; bf16 is computed from fp32's."""
        int8 = self.precision == "int8"
        if self.backend == ONNX:
            return f"onnx/model_qint8_{_onnx_target()}.onnx" if int8 else "onnx/model.onnx"
        return "openvino/openvino_model_qint8_quantized.xml" if int8 else "openvino/openvino_model.xml"

    def check_installed(self, modules: tuple[str, ...] | None = None) -> None:
        """Check that the backend's packages are installed.

        Args:
            modules: those that are needed; None: all, as for an export.

        Raises:
            UserError: one is missing.
        """
        needed = _MODULES[self.backend] if modules is None else modules
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise UserError(
                f"--encode_backend {self.backend} requires the package {missing[0]}: "
                f"pip install 'raybge[{self.backend}]'"
            )

    def check_torch(self) -> None:
        """Raise UserError for an exported model, which is neither saved nor given other weights."""
        if self.exported:
            raise UserError(
                f"encode_backend {self.backend}: weights are saved and loaded in torch alone; raybge.export_model "
                "writes exported models"
            )

    def check_device(self, use_gpu: bool | None) -> None:
        """Raise UserError if an exported model is to run on a GPU."""
        if self.exported and use_gpu:
            raise UserError(
                f"--encode_backend {self.backend} runs on CPUs: omit --use_gpu, or omit --encode_backend, since torch "
                "is fast on GPUs"
            )


def _onnx_target() -> str:
    """Return sentence-transformers' name of the instructions that an int8 ONNX model is made for."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    return "avx512_vnni" if "avx512_vnni" in _cpu_flags() else "avx2"


def _cpu_flags() -> set[str]:
    """Return the instruction sets of this CPU; empty where the system does not list them."""
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return set(next((line.split() for line in file if line.startswith("flags")), []))
