"""Exported models: vectors of torch, made once, never those of another model, nothing left of a failure."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SENTENCE, make_tiny

from raybge.cli.console import Console
from raybge.cluster.resources import Plan
from raybge.model.backends import exported_models
from raybge.model.backends.choice import BackendChoice
from raybge.model.backends.export_process import ExportRequest, export
from raybge.model.backends.sample_texts import library_texts
from raybge.model.encoder import Encoder
from raybge.model.lora import Lora
from raybge.model.spec import EncoderSpec
from raybge.search.embedder import exported_digest, make_embedder, prepare_export
from raybge.util.errors import UserError

PIECES = SENTENCE.split()
TEXTS = [" ".join(PIECES[i % 7 : i % 7 + 2 + i % 13]) for i in range(30)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Export in this process, which takes less time; `calls` are the requests."""
    calls: list[ExportRequest] = []

    def run(request: ExportRequest) -> dict:
        calls.append(request)
        return export(request)

    monkeypatch.setattr(exported_models, "run_export", run)
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize(
    ("kind", "backend"), [("bert", "openvino"), ("roberta", "onnx"), ("mpnet", "openvino"), ("qwen3", "onnx")]
)
def test_vectors_are_those_of_torch(kind, backend, tmp_path):
    """Texts of all lengths, up to the model's own, with padding; pooling of the folder's kind."""
    model = make_tiny(tmp_path / "model", kind)
    texts = [*TEXTS, "lane", " ".join(PIECES * 4), ""]
    expected = Encoder(model, devices="cpu")
    exported = Encoder(model, encode_backend=backend, export_dir=str(tmp_path / "exports"))
    assert exported.passage_max_length == expected.passage_max_length and exported.dim == expected.dim
    assert exported.model.pooling == expected.model.pooling
    np.testing.assert_allclose(exported.encode(texts), expected.encode(texts), atol=2e-6)
    assert len(np.unique(exported.encode(TEXTS), axis=0)) > 20


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_int8_is_near_to_torch_and_stated(folder, exports, backend):
    exported = Encoder(folder, encode_backend=backend, encode_precision="int8", export_dir=exports)
    expected = Encoder(folder, devices="cpu").encode(TEXTS)
    cosines = (exported.encode(TEXTS) * expected).sum(axis=1)
    assert 0.8 < cosines.min() < 0.9999999 and cosines.mean() > 0.95
    [record] = [
        json.loads(path.read_text())
        for path in Path(exports).rglob("*.json")
        if f"/{backend}/" in str(path) and "qint8" in path.name
    ]
    assert 0.8 < record["cosine"]["min"] <= record["cosine"]["mean"] <= 1 and record["cosine"]["texts"] == 100
    assert "precision='int8'" in repr(exported)


def test_int8_of_openvino_does_not_depend_on_padding(folder, exports):
    """Its ranges are fixed: a text has one vector, whatever the longest text of its chunk is."""
    encoder = Encoder(folder, encode_backend="openvino", encode_precision="int8", export_dir=exports)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    padded = np.concatenate([encoder.encode([text, " ".join(PIECES * 2)])[:1] for text in TEXTS])
    np.testing.assert_allclose(alone, padded, atol=1e-5)


def test_a_model_is_exported_once(folder, exports, in_this_process):
    first = Encoder(folder, encode_backend="openvino", encode_precision="fp32", export_dir=exports)
    made = len(in_this_process)
    second = Encoder(folder, encode_backend="openvino", encode_precision="bf16", export_dir=exports, use_fp16=True)
    third = Encoder(
        folder, encode_backend="openvino", export_dir=exports, passage_max_length=5, pooling_method="mean", batch_size=2
    )
    assert len(in_this_process) == made <= 1
    assert {each.backend.precision for each in (first, second, third)} == {"fp32", "bf16"}


def test_an_export_depends_on_the_weights(folder, exports, in_this_process, tmp_path):
    Encoder(folder, encode_backend="openvino", export_dir=exports)
    other = make_tiny(tmp_path / "other", num_hidden_layers=1)
    before = len(in_this_process)
    Encoder(other, encode_backend="openvino", export_dir=exports)
    assert len(in_this_process) == before + 1


@pytest.fixture(scope="module")
def exported_folder(folder, tmp_path_factory) -> str:
    """A folder as `raybge.export` writes it."""
    target = tmp_path_factory.mktemp("exported") / "model"
    target.mkdir()
    export(ExportRequest({"model_name_or_path": folder}, "openvino", "fp32", str(target), whole=True, texts=TEXTS))
    return str(target)


def test_an_exported_folder_is_read_instead_of_exporting(exported_folder, in_this_process, tmp_path):
    encoder = Encoder(exported_folder, encode_backend="openvino", export_dir=str(tmp_path))
    assert in_this_process == [] and not list(tmp_path.iterdir())
    np.testing.assert_allclose(encoder.encode(TEXTS), Encoder(exported_folder, devices="cpu").encode(TEXTS), atol=2e-6)


def test_files_of_another_model_are_refused(exported_folder, tmp_path):
    other = make_tiny(tmp_path / "other", num_hidden_layers=1)
    shutil.copytree(f"{exported_folder}/openvino", f"{other}/openvino")
    with pytest.raises(
        UserError, match=r"openvino_model\.xml was exported from other weights than those of this folder"
    ):
        Encoder(other, encode_backend="openvino", export_dir=str(tmp_path / "exports"))
    Encoder(other, devices="cpu")


def test_files_without_a_record_are_not_used(exported_folder, in_this_process, tmp_path):
    """Whose they are is unknown: a folder that sentence-transformers exported is exported anew."""
    copy = shutil.copytree(exported_folder, tmp_path / "copy")
    (copy / "openvino/openvino_model.xml.json").unlink()
    Encoder(str(copy), encode_backend="openvino", export_dir=str(tmp_path / "exports"))
    assert len(in_this_process) == 1


def test_a_damaged_file_is_named(exported_folder, tmp_path):
    copy = shutil.copytree(exported_folder, tmp_path / "copy")
    (copy / "openvino/openvino_model.xml").write_text("<net")
    with pytest.raises(UserError, match=r"the exported model .*openvino_model\.xml does not load"):
        Encoder(str(copy), encode_backend="openvino")


def test_a_failed_export_leaves_nothing(folder, monkeypatch, tmp_path):
    def fail(request: ExportRequest) -> dict:
        Path(request.folder, "openvino").mkdir()
        Path(request.folder, "openvino/openvino_model.bin").write_bytes(b"half")
        raise UserError("cannot be exported")

    monkeypatch.setattr(exported_models, "run_export", fail)
    with pytest.raises(UserError, match="cannot be exported"):
        Encoder(folder, encode_backend="openvino", export_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_keeps_its_export(folder, monkeypatch, tmp_path):
    """Two processes export the same model: the second finds the folder of the first and leaves it as it is."""
    choice = BackendChoice("openvino", "fp32")

    def slow(request: ExportRequest) -> dict:
        record = export(request)
        place = Path(request.folder.rpartition(".part-")[0])
        shutil.copytree(request.folder, place)
        (place / "first").touch()
        return record

    monkeypatch.setattr(exported_models, "run_export", slow)
    found = exported_models.find_or_export(EncoderSpec(folder, export_dir=str(tmp_path)).keywords(), choice)
    [kept] = tmp_path.iterdir()
    assert (kept / "first").exists() and found.local_file() == f"{kept}/openvino/openvino_model.xml"


def test_a_model_whose_vectors_change_is_refused(folder, monkeypatch, tmp_path):
    from raybge.model.backends import comparison

    monkeypatch.setattr(comparison, "cosines", lambda *arguments: {"mean": 0.99, "min": 0.9, "texts": 3})
    request = ExportRequest({"model_name_or_path": folder}, "openvino", "fp32", str(tmp_path), texts=TEXTS)
    with pytest.raises(UserError, match=r"cannot be exported for --encode_backend openvino: .* a cosine of 0\.900"):
        export(request)


def test_a_model_that_torch_cannot_export(folder, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise RuntimeError("Could not guard on data-dependent expression\nlong trace")

    monkeypatch.setattr(torch.export, "export", refuse)
    request = ExportRequest({"model_name_or_path": folder}, "onnx", "fp32", str(tmp_path), texts=TEXTS)
    with pytest.raises(
        UserError, match=f"the model {folder} cannot be exported for --encode_backend onnx; use torch: Co"
    ):
        export(request)


def test_what_an_exported_model_does_not_do(exported_folder, tmp_path):
    for options in ({"devices": ["cpu", "cpu"]}, {"devices": "meta"}):
        with pytest.raises(UserError, match="encode_backend openvino runs on one CPU"):
            Encoder(exported_folder, encode_backend="openvino", **options)
    with pytest.raises(UserError, match="is not trained; omit lora"):
        Encoder(exported_folder, encode_backend="openvino", lora=Lora(4))
    encoder = Encoder(exported_folder, encode_backend="openvino")
    for call in (encoder.save, encoder.load_weights):
        with pytest.raises(UserError, match="weights are saved and loaded in torch alone"):
            call(tmp_path / "saved")


def test_identities_of_vectors_contain_backend_and_precision(folder, exports):
    plan = Plan(1, 1, 0)
    choices = (("torch", None), ("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
    specs = [EncoderSpec(folder, encode_backend=b, encode_precision=p, export_dir=exports) for b, p in choices]
    identities = [make_embedder(spec, plan).identity for spec in specs]
    assert len(set(identities)) == len(specs)


def test_a_command_and_its_actors_look_for_one_export(folder, in_this_process, tmp_path):
    """The driver exports by the spec; an actor's Encoder opens that, and exports nothing."""
    spec = EncoderSpec(folder, encode_backend="openvino", encode_precision="fp32", export_dir=str(tmp_path))
    prepare_export(spec, Console())
    assert exported_digest(spec) and len(in_this_process) == 1
    make_embedder(spec, Plan(1, 1, 0)).load("cpu")
    assert len(in_this_process) == 1


def test_an_actor_that_does_not_see_the_export_exports_nothing(folder, in_this_process, tmp_path):
    spec = EncoderSpec(folder, encode_backend="openvino", encode_precision="fp32", export_dir=str(tmp_path))
    with pytest.raises(UserError, match="this node does not see the export in .*: set --storage_path to a folder"):
        make_embedder(spec, Plan(1, 1, 0)).load("cpu")
    assert in_this_process == []


def test_the_identity_depends_on_the_export_and_not_on_its_place(folder, exports, tmp_path):
    Encoder(folder, encode_backend="openvino", export_dir=exports)
    places = [
        exports,
        str(shutil.copytree(exports, tmp_path / "copy")),
        str(shutil.copytree(exports, tmp_path / "new")),
    ]
    for path in Path(places[2]).rglob("openvino_model.xml.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "other"}))
    specs = [
        EncoderSpec(folder, encode_backend="openvino", encode_precision="fp32", export_dir=each) for each in places
    ]
    same, copied, other = (make_embedder(spec, Plan(1, 1, 0)).identity for spec in specs)
    assert same == copied != other


def test_sample_texts_are_fixed_and_of_all_lengths():
    texts = library_texts()
    assert texts == library_texts() and len(texts) == len(set(texts)) == 100
    assert min(map(len, texts)) < 100 and max(map(len, texts)) > 2000
