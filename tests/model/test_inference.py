"""What an Encoder does beside the vectors themselves: several devices, prefixes, bytes, similarity, a progress bar."""

import io
import json
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from tqdm import tqdm

from raybge.model import inference
from raybge.model.encoder import Encoder
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
    library = pytest.importorskip("sentence_transformers", reason="extra `dev`")

    def load(normalize: bool):
        modules = library.sentence_transformer.modules
        parts = [modules.Transformer(folder), modules.Pooling(16, "cls")]
        return library.SentenceTransformer(modules=[*parts, modules.Normalize()] if normalize else parts, device="cpu")

    return load


# --- several devices --------------------------------------------------------------------------------------


def test_several_devices_give_one_devices_vectors_in_order(folder, encoder, monkeypatch):
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 20)  # many chunks
    two = Encoder(folder, devices=["cpu", "cpu"])
    met = threading.Barrier(2, timeout=60)
    met_by: set[int] = set()

    def meet(model, *given):
        """Both copies must have a chunk before either goes on."""
        if id(model) not in met_by:
            met_by.add(id(model))
            met.wait()

    models = [two.model, *two._copies]
    assert len({id(model) for model in models}) == 2
    hooks = [model.register_forward_pre_hook(meet) for model in models]
    found = two.encode(TEXTS)
    for hook in hooks:
        hook.remove()
    assert len(met_by) == 2
    assert len(np.unique(found, axis=0)) > 20  # texts out of place would be seen
    np.testing.assert_array_equal(found, encoder.encode(TEXTS))
    np.testing.assert_allclose(found, [encoder.encode(text) for text in TEXTS], atol=1e-5)


def test_copies_follow_loaded_weights_and_keep_dropout_off(folder, tmp_path):
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


def test_an_error_on_one_device_ends_all(folder, monkeypatch):
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 4)
    two = Encoder(folder, devices=["cpu", "cpu"])
    begun, failed = threading.Event(), threading.Event()
    calls = []

    def broken(model, *given):
        begun.wait(60)  # both have a chunk
        failed.set()
        raise RuntimeError("out of memory")

    def sound(model, *given):
        calls.append(1)
        begun.set()
        failed.wait(60)
        time.sleep(0.2)  # by now the error has emptied what waits

    two.model.register_forward_pre_hook(broken)
    two._copies[0].register_forward_pre_hook(sound)
    with pytest.raises(RuntimeError, match="out of memory"):
        two.encode(TEXTS)
    assert len(calls) == 1


def test_half_precision_is_for_gpus_alone(monkeypatch, folder):
    assert [str(device) for device in inference.pick_devices([0, "cuda:1", "cpu"])] == ["cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="runs on one device, found"):
        inference.pick_device(["cuda:0", "cuda:1"])
    assert not Encoder(folder, use_fp16=True, devices=["cpu", "cpu"]).use_fp16


# --- prefixes of the vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_are_sentence_transformers(folder, st, normalize):
    """Theirs normalise again where the call asks for it, whatever the folder says: here, where the model normalises."""
    encoder = Encoder(folder, normalize, devices="cpu", truncate_dim=5)
    expected = st(normalize).encode(TEXTS, truncate_dim=5, normalize_embeddings=normalize)
    for found in (encoder.encode(TEXTS), encoder.encode_queries(TEXTS), encoder.encode_corpus(TEXTS)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) == normalize
    whole = Encoder(folder, normalize, devices="cpu")
    np.testing.assert_array_equal(whole.encode(TEXTS, truncate_dim=5), encoder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.encode(TEXTS, truncate_dim=16), whole.encode(TEXTS))
    assert encoder.encode("row").shape == (5,) and encoder.dim == 16


def test_a_saved_model_is_whole(folder, tmp_path):
    Encoder(folder, devices="cpu", truncate_dim=3).save(tmp_path / "saved")
    assert Encoder(str(tmp_path / "saved"), devices="cpu").encode("row").shape == (16,)
    pooling = json.loads((tmp_path / "saved" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 16


@pytest.mark.parametrize("width", [0, -1, 17])
def test_a_width_that_the_model_lacks_is_named(folder, encoder, width):
    said = f"truncate_dim must be from 1 to 16, this model's width; found {width}"
    with pytest.raises(UserError, match=said):
        encoder.encode(["row"], truncate_dim=width)
    with pytest.raises(UserError, match=said):
        Encoder(folder, devices="cpu", truncate_dim=width)


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float32"])
def test_encoding_to_bytes_is_sentence_transformers(encoder, st, precision):
    quantize = pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings
    vectors_ND = encoder.encode(TEXTS)
    ranges_2D = np.stack([vectors_ND.min(0), vectors_ND.max(0)]) * 0.9
    for given in ({}, {"ranges": ranges_2D}, {"calibration_embeddings": vectors_ND[::5]}):
        found = encoder.encode(TEXTS, precision=precision, **given)
        expected = quantize(vectors_ND, precision, **given)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    one = encoder.encode_queries(TEXTS[4], precision=precision, ranges=ranges_2D, convert_to_numpy=False)
    assert isinstance(one, torch.Tensor) and one.ndim == 1
    np.testing.assert_array_equal(one, quantize(encoder.encode_queries(TEXTS[4]), precision, ranges=ranges_2D))


def test_an_argument_that_there_is_not_is_named(encoder):
    with pytest.raises(TypeError, match="unexpected argument truncate_dims"):
        encoder.encode(["row"], truncate_dims=5)


# --- similarity -------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_where_the_model_normalises(folder, encoder, st):
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
    ("terminal", "long", "asked", "seen"),
    [
        (True, True, None, True),
        (True, False, None, False),
        (False, True, None, False),
        (False, False, True, True),
        (True, True, False, False),
    ],
)
def test_a_bar_is_shown_on_a_terminal_when_it_takes_long(encoder, monkeypatch, terminal, long, asked, seen):
    console = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    monkeypatch.setattr(inference, "_LONG", 1e-6 if long else 1e6)
    monkeypatch.setattr(inference, "tqdm", partial(tqdm, mininterval=0, miniters=1))  # drawn at every update
    monkeypatch.setattr("raybge.model.encoder.CPU_TOKENS_PER_CHUNK", 20)
    encoder.encode(TEXTS, show_progress_bar=asked)
    assert ("texts" in console.getvalue()) == seen
