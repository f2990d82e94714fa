"""Fine-tuning of embedding models at any scale, as one Ray program.

Names are loaded when first used, so that `import raybge` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raybge.util.versions import RAYBGE as __version__  # noqa: F401

if TYPE_CHECKING:
    from raybge.encode import encode_dataset
    from raybge.encoding.run import EncodingResult
    from raybge.evaluate import evaluate_retrieval
    from raybge.evaluation.run import EvaluationResult
    from raybge.export import export_model
    from raybge.exporting.run import ExportResult
    from raybge.merge import mix_models, mix_models_by_layers, mix_models_with_data
    from raybge.merging.run import MergeResult
    from raybge.mine import mine_hard_negatives
    from raybge.mining.results import MiningResult
    from raybge.model.encoder import Encoder
    from raybge.model.quantization import quantize_embeddings
    from raybge.pretrain import pretrain_retromae
    from raybge.train import finetune
    from raybge.training.training_result import TrainingResult
    from raybge.tune import tune_finetune
    from raybge.tuning.tuning_results import TuningResult
    from raybge.util.errors import UserError

_HOMES = {
    "Encoder": "raybge.model.encoder",
    "mine_hard_negatives": "raybge.mine",
    "finetune": "raybge.train",
    "pretrain_retromae": "raybge.pretrain",
    "tune_finetune": "raybge.tune",
    "mix_models": "raybge.merge",
    "mix_models_by_layers": "raybge.merge",
    "mix_models_with_data": "raybge.merge",
    "evaluate_retrieval": "raybge.evaluate",
    "encode_dataset": "raybge.encode",
    "export_model": "raybge.export",
    "quantize_embeddings": "raybge.model.quantization",
    "EncodingResult": "raybge.encoding.run",
    "EvaluationResult": "raybge.evaluation.run",
    "ExportResult": "raybge.exporting.run",
    "MergeResult": "raybge.merging.run",
    "MiningResult": "raybge.mining.results",
    "TrainingResult": "raybge.training.training_result",
    "TuningResult": "raybge.tuning.tuning_results",
    "UserError": "raybge.util.errors",
}
__all__ = [
    "Encoder",
    "EncodingResult",
    "EvaluationResult",
    "ExportResult",
    "MergeResult",
    "MiningResult",
    "TrainingResult",
    "TuningResult",
    "UserError",
    "encode_dataset",
    "evaluate_retrieval",
    "export_model",
    "finetune",
    "mine_hard_negatives",
    "mix_models",
    "mix_models_by_layers",
    "mix_models_with_data",
    "pretrain_retromae",
    "quantize_embeddings",
    "tune_finetune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raybge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
