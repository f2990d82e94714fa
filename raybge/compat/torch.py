"""Parts of torch without a stability promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raybge.compat.library_versions import require

if TYPE_CHECKING:
    from torch import Tensor

# Prefix that torch.compile inserts into the names of a module's weights; torch has no function that removes it.
COMPILED_PREFIX = "_orig_mod."
# Classes and functions with which torch describes the tensors of a sharded checkpoint in its index, by module. The
# format has no specification: these are the names in the pickles that torch writes. Python 3.13 has PosixPath in
# pathlib._local.
SHARDED_INDEX_NAMES = {
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
# Classes in the files that DeepSpeed writes with torch.save, as of 0.19, by module: values without code of their own.
# DeepSpeed does not document the content of its files.
DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


def set_logged_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Set the learning rates that `scheduler.get_last_lr()` returns until the next step.

    A scheduler only updates them in `step()`, but transformers logs them before, when a run resumes with another
    learning rate.
    """
    require(scheduler, "_last_lr", "torch")  # a new name would be set without effect
    scheduler._last_lr = list(rates)


def skip_step_where(optimizer: Any, flag: Tensor) -> bool:
    """Have an optimizer leave out its next step if a number on the device is 1, which the host need not know.

    torch's fused optimizers have this for its GradScaler; parameters, moments and step count stay as they are.

    Args:
        optimizer: an optimizer of torch.
        flag: scalar fp32 tensor, 0 or 1, on the device of the parameters; it holds until another one is set.

    Returns:
        True if the optimizer does so; False if it cannot.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf = flag
    return True


def flash_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bound_E: Tensor,
    longest: int,
    dropout: float,
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Compute attention within each of several concatenated texts by FlashAttention, with dropout; half precision only.

    torch's public `torch.nn.attention.varlen.varlen_attn` has no dropout; this is the operator that it calls.

    Args:
        q_THD: queries of all T tokens, on a GPU.
        k_THD: keys; H may be a divisor of that of the queries (grouped-query attention).
        v_THD: values, like the keys.
        bound_E: first token of each text and the end of the last, int32.
        longest: tokens of the longest text.
        dropout: probability of dropping an attention weight.
        scale: factor of the scores; None: 1 / sqrt(D).
        causal: a token attends to earlier ones only.

    Returns:
        (T, H, D).
    """
    import torch

    attend = require(torch.ops.aten, "_flash_attention_forward", "torch")
    bounds = bound_E, bound_E, longest, longest
    out_THD: Tensor = attend(q_THD, k_THD, v_THD, *bounds, dropout, causal, False, scale=scale)[0]
    return out_THD


def efficient_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bound_E: Tensor,
    longest: int,
    dropout: float,
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Compute what `flash_attention` does by the memory-efficient kernel, which also has fp32.

    torch has no public function for it. Queries, keys and values have equally many heads.
    """
    import torch

    attend = require(torch.ops.aten, "_efficient_attention_forward", "torch")
    bounds = bound_E, bound_E, longest, longest
    mask = 1 if causal else 0  # numbers of the kernel's masks: causal, none
    out_1THD: Tensor = attend(q_THD[None], k_THD[None], v_THD[None], None, *bounds, dropout, mask, True, scale=scale)[0]
    return out_1THD[0]


def softmax_backward(grad: Tensor, softmax: Tensor) -> Tensor:
    """Compute the gradient of the input of a softmax over the last dimension, in fp32, rounded to the tensors' type.

    torch's autograd calls this operator; torch has no public function for it.

    Args:
        grad: gradient of the output.
        softmax: the output.

    Returns:
        A tensor like `grad`.
    """
    import torch

    backward = require(torch.ops.aten, "_softmax_backward_data", "torch")
    result: Tensor = backward(grad, softmax, -1, grad.dtype)
    return result
