"""Encoder options: several devices, truncated and quantized vectors, similarity, the progress bar."""

import io
import itertools
import json
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st_
from tqdm import tqdm

from raybge.model import inference
from raybge.model.embedding import plan_chunks
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK, Encoder
from raybge.util.errors import UserError

TEXTS = [
    f"{first} {second} of the text that we read"[: 4 + 3 * i]
    for i, first in enumerate("what lane row".split() * 4)
    for second in ("block", "node", "length")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(folder) -> Encoder:
    return Encoder(folder, devices="cpu")


@pytest.fixture
def st(folder):
    """The same model in sentence-transformers."""
    import sentence_transformers as library

    def load(normalize: bool):
        modules = library.sentence_transformer.modules
        parts = [modules.Transformer(folder), modules.Pooling(16, "cls")]
        return library.SentenceTransformer(modules=[*parts, modules.Normalize()] if normalize else parts, device="cpu")

    return load


# --- chunks of texts whose tokens arrive in groups --------------------------------------------------------------------


@given(
    lengths=st_.lists(st_.integers(0, 9), max_size=60),
    budget=st_.integers(1, 40),
    cuts=st_.lists(st_.integers(0, 60), max_size=4),
)
def test_chunks_of_groups_are_those_of_all_texts_at_once(lengths, budget, cuts):
    """In their order too: on a CPU the vectors are the same, bit for bit."""
    texts = [np.full(length, row) for row, length in enumerate(lengths)]
    bounds = [0, *sorted(cuts), len(texts)]
    groups = [texts[start:stop] for start, stop in itertools.pairwise(bounds)]
    found = list(inference.plan_groups(groups, 9, budget))
    assert [rows for rows, _ in found] == plan_chunks(lengths, budget)
    assert all(ids is texts[row] for rows, part in found for row, ids in zip(rows, part, strict=True))


def test_texts_of_the_greatest_length_run_before_the_others_are_known():
    """Their tokens are not held, and the device is busy meanwhile."""
    known = []

    def groups():
        for number in range(3):
            known.append(number)
            yield [np.zeros(9 if i % 2 else i) for i in range(8)]

    chunks = inference.plan_groups(groups(), 9, 27)
    assert (next(chunks)[0], known) == ([1, 3, 5], [0])
    assert (next(chunks)[0], known) == ([7, 9, 11], [0, 1])


@pytest.mark.parametrize("on_cpu", [True, False], ids=["on a CPU", "on a GPU"])
def test_a_thread_tokenizes_for_a_gpu(folder, monkeypatch, on_cpu):
    """The vectors are the same; on a CPU a thread would take the model's cores."""
    encoder = Encoder(folder, devices="cpu")
    expected = encoder.encode(TEXTS)
    threads = set()

    def tokenize(texts, max_length, tokenize=encoder.tokenize):
        threads.add(threading.get_ident())
        return tokenize(texts, max_length)

    monkeypatch.setattr(encoder, "tokenize", tokenize)
    monkeypatch.setattr("raybge.model.encoder.TEXTS_PER_TOKENIZER_CALL", 5)
    monkeypatch.setattr(encoder, "batch_size", inference_batch(encoder))
    monkeypatch.setattr(encoder, "_on_cpu", on_cpu)
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert (threading.get_ident() in threads) == on_cpu and len(threads) == 1


def inference_batch(encoder: Encoder) -> int:
    """Return the batch size with the chunks of a CPU."""
    return CPU_TOKENS_PER_CHUNK // encoder.passage_max_length


def test_token_ids_give_the_vectors_of_their_texts(folder, encoder):
    ids = [np.array(each, np.int32) for each in encoder.tokenize(TEXTS, 5)]
    np.testing.assert_array_equal(encoder.encode_token_ids(ids, 5), encoder.encode(TEXTS, max_length=5))


# --- several devices --------------------------------------------------------------------------------------


def test_several_devices_give_the_vectors_of_one_in_order(folder, encoder, monkeypatch):
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 20)  # many chunks
    two = Encoder(folder, devices=["cpu", "cpu"])
    met = threading.Barrier(2, timeout=60)
    met_by: set[int] = set()

    def meet(model, *inputs):
        """Both copies must have a chunk before either goes on."""
        if id(model) not in met_by:
            met_by.add(id(model))
            met.wait()

    models = [two.model, *two._copies]
    assert len({id(model) for model in models}) == 2
    hooks = [model.register_forward_pre_hook(meet) for model in models]
    result = two.encode(TEXTS)
    for hook in hooks:
        hook.remove()
    assert len(met_by) == 2
    assert len(np.unique(result, axis=0)) > 20  # texts out of place would be seen
    np.testing.assert_array_equal(result, encoder.encode(TEXTS))
    np.testing.assert_allclose(result, [encoder.encode(text) for text in TEXTS], atol=1e-5)


def test_copies_have_the_loaded_weights_and_no_dropout(folder, tmp_path):
    from tiny import make_tiny

    other = make_tiny(tmp_path / "other", initializer_range=0.3)
    Encoder(other, devices="cpu").save(tmp_path / "saved")
    expected = Encoder(str(tmp_path / "saved"), devices="cpu").encode(TEXTS)
    two = Encoder(folder, devices=["cpu", "cpu"])
    before = two.encode(TEXTS)
    two.model.train()
    np.testing.assert_allclose(two.encode(TEXTS), before, atol=1e-6)
    two.load_weights(tmp_path / "saved")
    two.model = None  # so that the copy alone is left
    two.model, two._copies = two._copies[0], []
    np.testing.assert_allclose(two.encode(TEXTS), expected, atol=1e-6)
    assert not np.allclose(before, expected, atol=1e-2)


def test_error_on_one_device_ends_all(folder, monkeypatch):
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 4)
    two = Encoder(folder, devices=["cpu", "cpu"])
    begun, failed = threading.Event(), threading.Event()
    calls = []

    def broken(model, *inputs):
        begun.wait(60)  # both have a chunk
        failed.set()
        raise RuntimeError("out of memory")

    def sound(model, *inputs):
        calls.append(1)
        begun.set()
        failed.wait(60)
        time.sleep(0.2)  # by now the error has emptied what waits

    two.model.register_forward_pre_hook(broken)
    two._copies[0].register_forward_pre_hook(sound)
    with pytest.raises(RuntimeError, match="out of memory"):
        two.encode(TEXTS)
    assert len(calls) == 1


def test_half_precision_requires_gpus_only(monkeypatch, folder):
    assert [str(device) for device in inference.pick_devices([0, "cuda:1", "cpu"])] == ["cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="runs on one device, found"):
        inference.pick_device(["cuda:0", "cuda:1"])
    assert not Encoder(folder, use_fp16=True, devices=["cpu", "cpu"]).use_fp16


# --- prefixes of the vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_equal_sentence_transformers(folder, st, normalize):
    """sentence-transformers normalizes again on request, raybge if the model normalizes."""
    encoder = Encoder(folder, normalize, devices="cpu", truncate_dim=5)
    expected = st(normalize).encode(TEXTS, truncate_dim=5, normalize_embeddings=normalize)
    for result in (encoder.encode(TEXTS), encoder.encode_queries(TEXTS), encoder.encode_corpus(TEXTS)):
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) == normalize
    whole = Encoder(folder, normalize, devices="cpu")
    np.testing.assert_array_equal(whole.encode(TEXTS, truncate_dim=5), encoder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.encode(TEXTS, truncate_dim=16), whole.encode(TEXTS))
    assert encoder.encode("row").shape == (5,) and encoder.dim == 16


def test_saved_model_has_the_full_width(folder, tmp_path):
    Encoder(folder, devices="cpu", truncate_dim=3).save(tmp_path / "saved")
    assert Encoder(str(tmp_path / "saved"), devices="cpu").encode("row").shape == (16,)
    pooling = json.loads((tmp_path / "saved" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 16


@pytest.mark.parametrize("width", [0, -1, 17])
def test_width_out_of_range_is_an_error(folder, encoder, width):
    message = f"truncate_dim must be from 1 to 16, this model's width; found {width}"
    with pytest.raises(UserError, match=message):
        encoder.encode(["row"], truncate_dim=width)
    with pytest.raises(UserError, match=message):
        Encoder(folder, devices="cpu", truncate_dim=width)


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float32"])
def test_quantized_vectors_equal_sentence_transformers(encoder, st, precision):
    from sentence_transformers.util.quantization import quantize_embeddings as quantize

    vectors_ND = encoder.encode(TEXTS)
    ranges_2D = np.stack([vectors_ND.min(0), vectors_ND.max(0)]) * 0.9
    for inputs in ({}, {"ranges": ranges_2D}, {"calibration_embeddings": vectors_ND[::5]}):
        result = encoder.encode(TEXTS, precision=precision, **inputs)
        expected = quantize(vectors_ND, precision, **inputs)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)
    one = encoder.encode_queries(TEXTS[4], precision=precision, ranges=ranges_2D, convert_to_numpy=False)
    assert isinstance(one, torch.Tensor) and one.ndim == 1
    np.testing.assert_array_equal(one, quantize(encoder.encode_queries(TEXTS[4]), precision, ranges=ranges_2D))


def test_unknown_argument_is_an_error(encoder):
    with pytest.raises(TypeError, match="unexpected argument truncate_dims"):
        encoder.encode(["row"], truncate_dims=5)


# --- similarity -------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_if_the_model_normalizes(folder, encoder, st):
    a_ND, b_MD = encoder.encode(TEXTS[:7]), encoder.encode(TEXTS[3:8])
    expected = st(True).similarity(a_ND, b_MD).numpy()
    np.testing.assert_allclose(encoder.similarity(a_ND, b_MD), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity(a_ND[2], b_MD), expected[2:3], atol=1e-6)
    tensor = encoder.similarity(torch.from_numpy(a_ND), torch.from_numpy(b_MD))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor, expected, atol=1e-6)
    plain = Encoder(folder, False, devices="cpu")
    a_ND, b_MD = plain.encode(TEXTS[:7]), plain.encode(TEXTS[3:8])
    np.testing.assert_allclose(plain.similarity(a_ND, b_MD), np.einsum("nd,md->nm", a_ND, b_MD), rtol=1e-5)
    with pytest.raises(UserError, match="floats, found int8"):
        encoder.similarity(a_ND.astype(np.int8), b_MD)


# --- progress ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "long", "show", "expected"),
    [
        (True, True, None, True),
        (True, False, None, False),
        (False, True, None, False),
        (False, False, True, True),
        (True, True, False, False),
    ],
)
def test_progress_bar_appears_on_a_terminal_after_a_delay(encoder, monkeypatch, terminal, long, show, expected):
    console = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    monkeypatch.setattr(inference, "_BAR_DELAY", 1e-6 if long else 1e6)
    monkeypatch.setattr(inference, "tqdm", partial(tqdm, mininterval=0, miniters=1))  # drawn at every update
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 20)
    encoder.encode(TEXTS, show_progress_bar=show)
    assert ("texts" in console.getvalue()) == expected
