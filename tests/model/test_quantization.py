"""Quantized vectors, byte for byte equal to those of sentence-transformers."""

import numpy as np
import pytest
import torch

from raybge import quantize_embeddings
from raybge.util.errors import UserError

BYTES = ("int8", "uint8")
BITS = ("binary", "ubinary")
E_ND = np.random.default_rng(0).normal(size=(300, 21)).astype(np.float32)  # 21: the last byte of bits is not full
E_ND[:, 4] = 0.25  # a dimension that is the same everywhere
E_ND[7, :3] = 0.0


@pytest.fixture(scope="module")
def peer():
    from sentence_transformers.util.quantization import quantize_embeddings

    return quantize_embeddings


def assert_same(result, expected):
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert result.tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", [*BYTES, *BITS, "float32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_equal_to_sentence_transformers(peer, precision, dtype):
    vectors_ND = E_ND.astype(dtype)
    result = quantize_embeddings(vectors_ND, precision)
    assert_same(result, peer(vectors_ND, precision))
    assert len(np.unique(result)) > 200 or precision == "float32"  # most steps or bit patterns occur


@pytest.mark.parametrize("precision", BYTES)
def test_equal_with_ranges_and_with_calibration(peer, precision):
    # narrower than the vectors: what lies outside becomes the nearest end
    ranges_2D = np.stack([E_ND.min(0) / 2, E_ND.max(0) / 3])
    result = quantize_embeddings(E_ND, precision, ranges=ranges_2D)
    assert_same(result, peer(E_ND, precision, ranges=ranges_2D))
    assert {result[:, 0].min(), result[:, 0].max()} == {np.iinfo(precision).min, np.iinfo(precision).max}
    assert_same(
        quantize_embeddings(E_ND[:5], precision, calibration_embeddings=E_ND[50:]),
        peer(E_ND[:5], precision, calibration_embeddings=E_ND[50:]),
    )
    assert_same(quantize_embeddings(E_ND[3], precision, ranges_2D), peer(E_ND[3], precision, ranges_2D))


@pytest.mark.parametrize("precision", [*BYTES, *BITS])
def test_input_types(peer, precision):
    expected = peer(E_ND, precision)
    assert_same(quantize_embeddings(torch.from_numpy(E_ND), precision), expected)
    assert_same(quantize_embeddings(list(E_ND), precision), expected)
    assert_same(quantize_embeddings(list(torch.from_numpy(E_ND)), precision), expected)
    coarse = torch.from_numpy(E_ND).bfloat16()
    assert_same(quantize_embeddings(coarse, precision), peer(coarse, precision))
    assert_same(quantize_embeddings(E_ND[:0], precision), peer(E_ND[:0], precision))


def test_bits_unpack_to_signs():
    bits = np.unpackbits(quantize_embeddings(E_ND, "ubinary"), axis=1)[:, :21]
    assert (bits == (E_ND > 0)).all()
    signed = quantize_embeddings(E_ND, "binary")
    assert ((signed.astype(int) + 128) == quantize_embeddings(E_ND, "ubinary")).all()


def test_error_is_below_one_step():
    low_D, high_D = E_ND.min(0), E_ND.max(0)
    level_ND = quantize_embeddings(E_ND, "int8").astype(np.float64) + 128
    below_ND = E_ND - (low_D + level_ND * (high_D - low_D) / 255)
    assert (below_ND > -1e-6).all() and (below_ND <= (high_D - low_D) / 255 + 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((E_ND, "int4"), "precision 'int4': expected one of float32, int8, uint8, binary, ubinary"),
        ((E_ND[0], "int8"), "ranges need two vectors or more, found 1"),
        ((E_ND[:1], "uint8"), "ranges need two vectors or more, found 1"),
        ((E_ND, "int8", E_ND[:2, :5]), r"expected the shape \(2, 21\), found \(2, 5\)"),
        ((E_ND.astype(np.int8), "binary"), "embeddings must be floats, found int8"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        quantize_embeddings(*arguments)
