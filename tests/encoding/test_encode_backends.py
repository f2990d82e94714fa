"""Encoding by an exported model on one Ray: the same bytes for any number of actors, one export in the storage path."""

import json
from pathlib import Path

import numpy as np
import pytest

from raybge import Encoder, encode_dataset, evaluate_retrieval, mine_hard_negatives
from raybge.search import inputs

ROWS = 90


@pytest.fixture(scope="module")
def data(tmp_path_factory, words) -> tuple[Path, list[str]]:
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(words, rng.integers(1, 15))) for _ in range(ROWS)]
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    groups = [{"query": " ".join(text.split()[:2]), "pos": [text]} for text in texts[:20]]
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    return folder, texts


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def encoded(ray_cluster, data, tiny_model, storage, tmp_path_factory) -> dict[tuple[str, int], np.ndarray]:
    """Return the vectors by (precision, actors)."""
    folder, vectors = tmp_path_factory.mktemp("out"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", 700)
        for precision in ("fp32", "int8"):
            for actors in (1, 3):
                output = folder / f"{precision}-{actors}.npy"
                encode_dataset(
                    model_name_or_path=tiny_model,
                    input_file=str(data[0] / "rows.jsonl"),
                    output_file=str(output),
                    encode_backend="openvino",
                    encode_precision=precision,
                    num_workers=actors,
                    # blocks that are in the store are not encoded again: each run has a store of its own
                    storage_path=str(storage if actors == 1 else folder / precision),
                )
                if actors == 3 and precision == "fp32":
                    (folder / "int8").mkdir()
                if actors == 1:  # the same export: another one might round differently
                    (folder / precision).mkdir(exist_ok=True)
                    (folder / precision / "exports").symlink_to(storage / "exports")
                vectors[precision, actors] = np.load(output)
    return vectors


def test_bytes_do_not_depend_on_actors(encoded):
    for precision in ("fp32", "int8"):
        assert encoded[precision, 1].tobytes() == encoded[precision, 3].tobytes()
    assert not np.array_equal(encoded["fp32", 1], encoded["int8", 1])


def test_vectors_are_those_of_torch(encoded, data, tiny_model):
    expected = Encoder(tiny_model, devices="cpu").encode_corpus(data[1])
    np.testing.assert_allclose(encoded["fp32", 1], expected, atol=2e-6)
    assert (encoded["int8", 1] * expected).sum(axis=1).mean() > 0.95


def test_the_storage_path_has_one_export_of_each_precision(encoded, storage):
    names = sorted(path.name for path in (storage / "exports").glob("*/openvino/*.xml"))
    assert names == ["openvino_model.xml", "openvino_model_qint8_quantized.xml"]


def test_other_commands_read_the_same_export(encoded, data, tiny_model, storage, tmp_path):
    before = sorted((storage / "exports").iterdir())
    flags = {"model_name_or_path": tiny_model, "encode_backend": "openvino", "storage_path": str(storage)}
    mined = mine_hard_negatives(
        **flags,
        encode_precision="int8",
        rescore=True,
        input_file=str(data[0] / "groups.jsonl"),
        corpus_data=str(data[0] / "rows.jsonl"),
        output_file=str(tmp_path / "mined.jsonl"),
        range_for_sampling="0-20",
        negative_number=5,
        num_workers=2,
    )
    assert mined.counts["ranks_rescored"] == 20 * 20
    fp32 = {
        precision: evaluate_retrieval(
            **{**flags, **options},
            corpus_data=str(data[0] / "rows.jsonl"),
            query_data=str(data[0] / "groups.jsonl"),
            num_workers=1,
        ).metrics["nDCG@10"]
        for precision, options in (("openvino", {"encode_precision": "fp32"}), ("torch", {"encode_backend": "torch"}))
    }
    assert fp32["openvino"] == pytest.approx(fp32["torch"], abs=1e-6)
    assert sorted((storage / "exports").iterdir()) == before
