"""Autocast without a shared copy of the weights, and fp32 products where they are asked for."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from raybge.losses.functional import softmax_terms
from raybge.model import precision
from raybge.model.embedding import EmbeddingModel
from raybge.model.encoder import Encoder
from raybge.model.precision import (
    _seconds_of_a_product,
    cpu_bf16_message,
    cpu_gains_by_bf16,
    full_precision,
    inference_dtype,
)

CHUNKS = 1000


def gradient(model: EmbeddingModel, texts: list[np.ndarray], precision: torch.dtype | None, sub_batch_size=None):
    """Return the gradient of the linear layers; every text has the same direction, so their gradients add up."""
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        e_ND = model.embed(texts, 1 << 30, None, sub_batch_size)
    (e_ND @ torch.linspace(-1, 1, e_ND.shape[1])).sum().backward()
    named = model.backbone.encoder.named_parameters()
    return torch.cat([p.grad.flatten().double() for name, p in named if p.dim() == 2])


def test_error_of_the_gradient_does_not_grow_with_the_number_of_chunks():
    """One copy of the weights in bf16 for all chunks adds their gradients in bf16: an error of 0.3 in this test."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = EmbeddingModel(BertModel(config, add_pooling_layer=False), "mean")
    random = np.random.default_rng(0)
    texts = [random.integers(5, 90, 4) for _ in range(CHUNKS)]
    exact = gradient(model, texts, None)
    one, many = (
        float((gradient(model, texts, torch.bfloat16, size) - exact).norm() / exact.norm()) for size in (None, 1)
    )
    assert 1e-4 < one < 0.05 and many < 2 * one


@pytest.fixture
def tf32():
    """Set the precision of --tf32, which on a CPU with matrix units is that of their bf16 products."""
    backend = torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, backend.fp32_precision
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision, backend.fp32_precision = before


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Records type and precision of each matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "matmul"):
            self.seen.add((args[0].dtype, torch.backends.cuda.matmul.fp32_precision))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_fp32_with_tf32_and_autocast(tf32, autocast):
    """Forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q_BD, p_ND = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (3, 5))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with Products() as products, context:
        denominator_B, _ = softmax_terms(q_BD, p_ND, torch.arange(3)[:, None], None, 0.1)
        denominator_B.sum().backward()
    assert products.seen == {(torch.float32, "ieee")}
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_full_precision_ends_with_the_block(tf32):
    device = torch.device("cpu")
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16), full_precision(device):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert not torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"  # which is inherited again
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("on_cpu", "use_fp16", "use_bf16", "dtype"),
    [
        (False, None, None, torch.float16),
        (False, True, False, torch.float16),
        (False, False, None, torch.float32),
        (False, True, True, torch.bfloat16),
        (False, False, True, torch.bfloat16),
        (True, True, True, torch.bfloat16),
        (True, False, True, torch.bfloat16),
        (True, True, False, torch.float32),
    ],
)
def test_precision_of_a_model_that_is_not_trained(monkeypatch, on_cpu, use_fp16, use_bf16, dtype):
    monkeypatch.setattr(precision, "cpu_gains_by_bf16", lambda: True)
    assert inference_dtype(on_cpu, use_fp16, use_bf16) == dtype
    monkeypatch.setattr(precision, "cpu_gains_by_bf16", lambda: False)
    assert inference_dtype(on_cpu, use_fp16, use_bf16) == (torch.float32 if on_cpu else dtype)


@pytest.mark.parametrize(
    ("capabilities", "measured", "gains"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, None, True),  # without a measurement
        ({"avx512_bf16": True}, (1.0, 0.7), True),
        ({"avx512_bf16": True}, (1.0, 0.9), False),
        ({"bf16": True}, (1.0, 0.5), True),  # Arm
        ({"avx2": True}, None, False),
    ],
)
def test_bf16_on_a_cpu_requires_a_gain(monkeypatch, capabilities, measured, gains):
    times = dict(zip((torch.float32, torch.bfloat16), measured or (), strict=False))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "_seconds_of_a_product", times.__getitem__)
    cpu_gains_by_bf16.cache_clear()
    try:
        assert cpu_gains_by_bf16() is gains
        assert ("is off" in cpu_bf16_message("--bf16")) is not capabilities.get("amx_bf16", False)
    finally:
        cpu_gains_by_bf16.cache_clear()


def test_time_of_a_product_is_measured():
    assert 0 < _seconds_of_a_product(torch.bfloat16) < 5


def test_weights_are_loaded_in_bf16(tiny_model, monkeypatch):
    """Vectors stay fp32 and close to those of fp32 weights."""
    exact = Encoder(tiny_model, devices="cpu").encode(["aa bc de", "ff gg"])
    monkeypatch.setattr(precision, "cpu_gains_by_bf16", lambda: True)
    encoder = Encoder(tiny_model, devices="cpu", use_bf16=True)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    vectors = encoder.encode(["aa bc de", "ff gg"])
    assert vectors.dtype == np.float32 and 0 < np.abs(vectors - exact).max() < 0.02
