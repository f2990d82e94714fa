"""Training on packed texts as on a GPU, with its kernels replaced by loops: against padded texts."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from packed_kernels import packed_kernels
from tiny import make_tiny
from torch.overrides import TorchFunctionMode

from raybge.data.step_batch import Groups, StepBatch
from raybge.losses.contrastive_model import ContrastiveModel
from raybge.losses.objective import Objective
from raybge.model import packing
from raybge.model.attention import use_fast_attention
from raybge.model.embedding import EmbeddingModel
from raybge.model.encoder import Encoder
from raybge.model.lora import Lora
from raybge.model.packing import packing_failure, prepare_for_inference, prepare_for_training

TEXTS = [np.random.default_rng(i).integers(6, 20, n) for i, n in enumerate((30, 2, 17, 1, 9, 24, 3, 12))]
POOLINGS = {"bert": "mean", "qwen3": "last_token"}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with packed_kernels():
        yield


def model_of(folder, kind: str, dropout: float = 0.0, lora: bool = False) -> EmbeddingModel:
    path = make_tiny(folder / kind, kind, dropout=dropout)
    adapters = Lora(4, 8, 0.0) if lora else None
    model = Encoder(path, pooling_method=POOLINGS.get(kind, "mean"), lora=adapters).model.train()
    use_fast_attention(model.backbone)
    if lora:
        with torch.no_grad():  # a new adapter's second factor is zero, and with it the first one's gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
    return model


def step(model: EmbeddingModel, packs: bool, precision=None, sub_batch_size=None, budget=4096):
    """Return vectors and the gradient of a loss."""
    model.packs = packs
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        e_ND = model.embed(TEXTS, budget, None, sub_batch_size)
    direction_ND = torch.randn(e_ND.shape, generator=torch.Generator().manual_seed(0))
    (e_ND * direction_ND).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return e_ND.detach(), torch.cat(grads)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize(("precision", "limit"), [(None, 2e-5), (torch.bfloat16, 0.06)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["plain", "sub-batches", "checkpointing", "LoRA with checkpointing"])
def test_packed_texts_train_like_padded_ones(tmp_path, kind, precision, limit, way):
    model = model_of(tmp_path, kind, lora="LoRA" in way)
    if "checkpointing" in way:
        model.backbone.activation_checkpointing_enable()
    sub_batch_size = 3 if way == "sub-batches" else None
    padded, padded_gradient = step(model, False, precision, sub_batch_size)
    packed, packed_gradient = step(model, True, precision, sub_batch_size)
    assert padded_gradient.norm() > 0.01
    assert distance(packed, padded) < limit and distance(packed_gradient, padded_gradient) < limit
    if precision is not None:  # and no farther from fp32 than padded ones
        _, exact = step(model, False, None, sub_batch_size)
        assert distance(packed_gradient, exact) < 1.5 * distance(padded_gradient, exact) + 1e-3


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_recomputed_chunks_repeat_the_dropout_of_the_kernel(tmp_path, kind, precision):
    """The same chunk, computed once and twice: equal only if each mask is drawn again."""
    model = model_of(tmp_path, kind, dropout=0.3)

    def gradient(sub_batch_size: int | None) -> torch.Tensor:
        torch.manual_seed(5)
        return step(model, True, precision, sub_batch_size)[1]

    once, again = gradient(None), gradient(len(TEXTS))
    assert distance(again, once) < 1e-6
    torch.manual_seed(6)
    assert distance(step(model, True, precision)[1], once) > 0.05  # dropout was on


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3", "llama"])
def test_check_accepts_models_that_pack(tmp_path, kind, precision):
    model = model_of(tmp_path, kind, dropout=0.1)
    model.backbone.activation_checkpointing_enable()
    before = torch.random.get_rng_state()
    assert prepare_for_training(model, precision, sub_batch_size=3) is None
    assert model.packs and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_check_says_what_is_wrong(tmp_path, monkeypatch):
    model = model_of(tmp_path, "bert", dropout=0.1)
    pack = model.pack
    with monkeypatch.context() as patch:
        patch.setattr(model, "pack", lambda *texts: (lambda ids, at, bounds: (ids, at.flip(1), bounds))(*pack(*texts)))
        assert "the vectors of packed texts differ by" in prepare_for_training(model)
    assert not model.packs

    def failing(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr("raybge.model.attention.flash_attention", failing)
        reason = prepare_for_training(model, torch.bfloat16)
        assert reason == "RuntimeError: FlashAttention only supports Ampere GPUs or newer." and not model.packs
        assert prepare_for_training(model) is None and model.packs  # fp32 has another kernel


def test_check_runs_the_backward_pass(tmp_path, monkeypatch):
    """A kernel whose forward pass is right and whose gradient is not."""
    from raybge.compat.torch import efficient_attention

    def attend(q, k, v, *rest):
        return efficient_attention(q.detach(), k, v, *rest)

    monkeypatch.setattr("raybge.model.attention.efficient_attention", attend)
    assert "the gradients of packed texts differ by" in packing_failure(model_of(tmp_path, "bert"), None, None)


def test_check_does_not_hide_that_memory_runs_out(tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "_step", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        prepare_for_training(model_of(tmp_path, "bert"))


# --- models that are not trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_encoder_packs(tmp_path, kind, dtype):
    """Against a text at a time without packing; the padded network is the canary."""
    folder = make_tiny(tmp_path / kind, kind)
    texts = [" ".join(["lane"] * n) for n in (9, 1, 5, 3)]
    encoder, padded = (Encoder(folder, pooling_method=POOLINGS.get(kind, "mean"), devices="cpu") for _ in range(2))
    padded._is_prepared = True
    expected = np.stack([padded.encode(text) for text in texts])
    calls: list[str] = []
    with packed_kernels(calls):
        encoder.model.to(dtype)
        found = encoder.encode(texts)
    assert encoder.model.packs and encoder.padding_reason is None and calls
    assert set(calls) == {"efficient" if dtype == torch.float32 else "flash"}
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_an_encoder_whose_model_does_not_pack_says_so_and_pads(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path / "bert", "bert")
    encoder = Encoder(folder, pooling_method="mean", devices="cpu")
    expected = Encoder(folder, pooling_method="mean", devices="cpu")
    expected._is_prepared = True
    pack = encoder.model.pack
    shifted = lambda *texts: (lambda ids, at, bounds: (ids, at.flip(1), bounds))(*pack(*texts))  # noqa: E731
    monkeypatch.setattr(encoder.model, "pack", shifted)
    with pytest.warns(UserWarning, match="padded, not packed: the vectors of packed texts differ by .* in float32"):
        found = encoder.encode(["lane row", "block"])
    assert not encoder.model.packs and encoder.padding_reason
    np.testing.assert_allclose(found, expected.encode(["lane row", "block"]), atol=1e-6)


def test_a_check_of_vectors_runs_in_the_precision_of_the_run(tmp_path):
    """Under bf16 autocast the kernel for half precision is checked: the guide of a training has fp32 weights."""
    calls: list[str] = []
    with packed_kernels(calls):
        model = model_of(tmp_path, "bert")
        assert prepare_for_inference(model, torch.bfloat16) is None and set(calls) == {"flash"}
        calls.clear()
        assert prepare_for_inference(model) is None and set(calls) == {"efficient"}
    assert model.training and model.packs


# --- waiting for the device -------------------------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts the calls for which the host waits on a GPU: copies that block, values on the host, unknown sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        waits = name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__float__", "__int__", "unique", "numpy")
        waits |= name in ("masked_select", "argwhere") or (name == "where" and len(args) == 1)
        waits |= name in ("tensor", "as_tensor") and "device" in kwargs
        moves = any(isinstance(each, torch.device) for each in (*args, *kwargs.values())) and "dtype" not in kwargs
        waits |= name == "to" and moves and not kwargs.get("non_blocking")
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) == 1
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits |= any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index)
        self.calls[name] += waits
        return function(*args, **kwargs)


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy as to a GPU, where it is pinned."""
    return torch.from_numpy(array).to(device, non_blocking=True)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "cls"), ("bert", "mean"), ("bert", "last_token"), ("qwen3", "last_token")]
)
def test_no_layer_waits_for_the_device(tmp_path, monkeypatch, kind, pooling):
    monkeypatch.setattr("raybge.model.embedding.send", sent)
    model = model_of(tmp_path, kind)
    model.pooling, model.packs = pooling, True
    model.backbone.activation_checkpointing_enable()
    with Waits() as waits:
        model.embed(TEXTS, 30)
    assert len(waits.calls) > 20  # it saw the calls
    assert waits.calls.total() == 0, +waits.calls


def test_a_step_waits_for_the_device_a_few_times(tmp_path, monkeypatch):
    """As often for one chunk as for five: for the sizes of the global batch, and for pairs of equal texts."""
    monkeypatch.setattr("raybge.model.embedding.send", sent)
    monkeypatch.setattr("raybge.losses.contrastive_model.send", sent)
    embedding = model_of(tmp_path, "bert")
    embedding.packs = True
    keys = np.array([1, 2, 3, 1])
    groups = Groups(np.full(4, 1), passage_key_M=keys, known_B=np.ones(4, np.int64), known_key_R=keys)
    batch = StepBatch(0, [(0, i) for i in range(4)], TEXTS, groups)
    counts = []
    for budget in (30, 4096):
        monkeypatch.setattr("raybge.losses.contrastive_model.CPU_TOKENS_PER_CHUNK", budget)
        with Waits() as waits:
            ContrastiveModel(embedding, Objective(0.05))(batch)
        counts.append(waits.calls.total())
    assert counts[0] == counts[1] <= 8
