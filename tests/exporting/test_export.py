"""`raybge.export`: the folder, what sentence-transformers makes of it, and wrong flags."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import SENTENCE, make_tiny

import raybge
from raybge.export import main
from raybge.exporting import run as exporting
from raybge.exporting import spec as exporting_spec
from raybge.model.backends.choice import BackendChoice
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

TEXTS = [SENTENCE, "what is a lane", "row block of the text that we read"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    pieces = SENTENCE.split()
    rows = [{"text": " ".join(pieces[i % 5 : i % 5 + 2 + i % 13])} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module", params=[("openvino", "int8"), ("onnx", "fp32")], ids="-".join)
def exported(request, model, samples, tmp_path_factory) -> tuple[str, str, str, raybge.ExportResult]:
    """Export by the command, in a process of its own; return the folder, backend, precision and result."""
    backend, precision = request.param
    output = str(tmp_path_factory.mktemp("out") / "exported")
    result = raybge.export_model(
        model_name_or_path=model,
        output_dir=output,
        encode_backend=backend,
        encode_precision=precision,
        sample_data=[samples],
    )
    return output, backend, precision, result


def test_the_folder_has_the_model_and_its_export(exported, model):
    output, backend, precision, result = exported
    record = json.loads(Path(output, f"{result.file}.json").read_text())
    assert result.file == BackendChoice(backend, precision).file and Path(output, result.file).is_file()
    assert record["cosine"] == {"mean": result.cosine, "min": result.min_cosine, "texts": 40}
    assert {"backend": backend, "precision": precision}.items() <= record.items()
    assert result.min_cosine > (0.8 if precision == "int8" else 0.99999)
    assert [path.name for path in Path(output).parent.iterdir()] == ["exported"]
    expected = Encoder(model, devices="cpu").encode(TEXTS)
    np.testing.assert_allclose(Encoder(output, devices="cpu").encode(TEXTS), expected, atol=1e-6)
    own = Encoder(output, encode_backend=backend, encode_precision=precision, export_dir="/nonexistent")
    cosines = (own.encode(TEXTS) * expected).sum(axis=1)
    assert cosines.min() > (0.8 if precision == "int8" else 0.99999)


def test_sentence_transformers_opens_it(exported):
    """Where optimum is installed, which requires an older transformers than raybge."""
    output, backend, precision, result = exported
    package = {"openvino": "optimum.intel", "onnx": "optimum.onnxruntime"}[backend]
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: it requires an older transformers")
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(
        output, backend=backend, device="cpu", model_kwargs={"file_name": Path(result.file).name}
    )
    ours = Encoder(output, encode_backend=backend, encode_precision=precision)
    np.testing.assert_allclose(peer.encode(TEXTS), ours.encode(TEXTS), atol=1e-2 if precision == "int8" else 1e-5)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_export(monkeypatch):
    """An export that ends in the middle."""

    def fail(request):
        Path(request.folder, "half").touch()
        raise UserError("the model cannot be exported")

    monkeypatch.setattr(exporting, "run_export", fail)


def test_a_failed_export_leaves_no_folder(no_export, model, tmp_path, capsys):
    assert main(["--model_name_or_path", model, "--output_dir", str(tmp_path / "out")]) == 2
    assert "raybge.export: the model cannot be exported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_folder_that_it_would_replace(no_export, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UserError, match="output_dir .* is not empty: choose another folder, or overwrite_output_dir"):
        raybge.export_model(model_name_or_path=model, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="cannot be exported"):
        raybge.export_model(model_name_or_path=model, output_dir=tmp_path / "out", overwrite_output_dir=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/file").exists()


def test_wrong_flags(no_export, model, samples, tmp_path, monkeypatch):
    def message(**flags) -> str:
        with pytest.raises(UserError) as error:
            raybge.export_model(**{"model_name_or_path": model, "output_dir": tmp_path / "out", **flags})
        return str(error.value)

    assert "is the folder of the model; choose another one" in message(output_dir=model, overwrite_output_dir=True)
    assert "expected a folder, found a file" in message(output_dir=samples)
    assert "expected a folder of this machine, found a URI" in message(output_dir="s3://bucket/model")
    assert "takes one of onnx, openvino" in message(encode_backend="torch")
    assert "takes one of fp32, int8" in message(encode_precision="bf16")
    assert "no such folder" in message(model_name_or_path=str(tmp_path / "none"))
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n')
    assert "bad.jsonl:1" in message(sample_data=[str(tmp_path / "bad.jsonl")])
    monkeypatch.setattr(exporting_spec, "IN_PROCESS_BYTES", 100)
    assert "some hundreds of passages are enough" in message(sample_data=[samples])
