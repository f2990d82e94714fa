"""Backend and precision of encoding: one rule for all flags, and one message for each wrong combination."""

import importlib.util

import pytest
import torch

from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions
from raybge.cli.parser import build_options
from raybge.evaluation.spec import EvaluationSpec
from raybge.mining.spec import MiningSpec
from raybge.model.backends import choice
from raybge.model.backends.choice import BackendChoice
from raybge.model.encoder import Encoder
from raybge.model.precision import inference_dtype
from raybge.model.spec import EncoderSpec
from raybge.util.errors import UserError


def spec(**flags) -> EncoderSpec:
    base = {"model_name_or_path": "org/model", "input_file": ["in"], "output_file": "out.npy"}
    return EncoderSpec.from_options(build_options(EncodeOptions, {**base, **flags}))


def test_flags_of_one_precision_give_one_spec():
    assert spec(encode_precision="bf16") == spec(use_bf16=True) == spec(use_bf16=True, encode_precision="bf16")
    assert spec(encode_precision="bf16") != spec() == spec(encode_backend="torch")
    assert spec(encode_precision="fp32") == spec(use_fp16=False)
    exported = spec(encode_backend="openvino", use_bf16=True, use_fp16=False)
    assert exported == spec(encode_backend="openvino", encode_precision="bf16")
    assert (exported.encode_precision, exported.use_bf16, exported.use_fp16) == ("bf16", None, None)
    assert spec(encode_backend="onnx").encode_precision == "fp32"


@pytest.mark.parametrize(
    ("precision", "use_fp16", "dtype"),
    [
        (None, None, torch.float16),
        (None, False, torch.float32),
        ("fp32", None, torch.float32),
        ("fp32", True, torch.float32),
        ("bf16", None, torch.bfloat16),
        ("bf16", False, torch.bfloat16),
    ],
)
def test_a_precision_decides_on_gpus_too(precision, use_fp16, dtype):
    assert inference_dtype(False, *BackendChoice.of("torch", precision, None).half_precision(use_fp16)) == dtype


def test_the_spec_in_fp32_is_that_of_torch():
    cheap = spec(encode_backend="openvino", encode_precision="int8", max_length=7)
    assert cheap.in_fp32() == spec(encode_precision="fp32", max_length=7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"encode_precision": "int8"}, "int8 requires --encode_backend openvino or onnx"),
        ({"encode_precision": "int8", "use_bf16": True}, "int8 and --use_bf16 contradict each other"),
        ({"encode_precision": "fp32", "use_bf16": True}, "fp32 and --use_bf16 contradict each other"),
        ({"encode_backend": "onnx", "encode_precision": "bf16"}, "ONNX Runtime has no bf16 on CPUs"),
        ({"encode_backend": "onnx", "use_bf16": True}, "ONNX Runtime has no bf16 on CPUs"),
        ({"encode_backend": "openvino", "use_gpu": True}, "--encode_backend openvino runs on CPUs: omit --use_gpu"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        spec(**flags)


@pytest.mark.parametrize(("backend", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_backend_without_its_extra(monkeypatch, backend, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    message = rf"--encode_backend {backend} requires the package {module}: pip install 'raybge\[{backend}\]'"
    with pytest.raises(UserError, match=message):
        spec(encode_backend=backend)
    with pytest.raises(UserError, match=message):
        Encoder("org/model", encode_backend=backend)


@pytest.mark.parametrize(("name", "value"), [("encode_backend", "tensorrt"), ("encode_precision", "fp8")])
def test_unknown_values_of_the_python_class(name, value):
    with pytest.raises(UserError, match=f"--{name} takes one of .*, found «{value}»"):
        Encoder("org/model", **{name: value})


def test_an_exported_model_runs_on_cpus_where_the_flags_leave_it_open(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "ak", "pos": ["al"]}\n')
    files = {"input_file": [str(rows)], "output_file": str(tmp_path / "out.jsonl"), "model_name_or_path": tiny_model}
    for flags, use_gpu in (({}, None), ({"encode_backend": "onnx"}, False), ({"use_gpu": False}, False)):
        options = build_options(MineOptions, {**files, **flags})
        assert MiningSpec.from_options(options).scale.use_gpu is use_gpu
    data = {"corpus_data": [str(rows)], "query_data": [str(rows)], "encode_backend": "openvino", "encoder": tiny_model}
    assert EvaluationSpec.from_options(build_options(EvaluateOptions, data)).scale.use_gpu is False


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        ({}, False),
        ({"encode_precision": "fp32"}, False),
        ({"encode_backend": "openvino"}, False),
        ({"use_gpu": True, "use_fp16": False}, False),
        ({"use_gpu": True, "encode_precision": "fp32"}, False),
        ({"use_gpu": True}, True),
        ({"use_bf16": True}, True),
        ({"encode_precision": "bf16"}, True),
        ({"encode_backend": "openvino", "encode_precision": "int8"}, True),
    ],
)
def test_rescoring_requires_a_cheap_precision(tiny_model, tmp_path, flags, accepted):
    (tmp_path / "rows.jsonl").write_text('{"query": "ak", "pos": ["al"]}\n')
    files = {"input_file": [str(tmp_path / "rows.jsonl")], "output_file": str(tmp_path / "out.jsonl"), "rescore": True}
    options = build_options(MineOptions, {**files, **flags, "model_name_or_path": tiny_model})
    if accepted:
        made = MiningSpec.from_options(options)
        assert made.rescore and made.search_depth > made.sampling.hi
        return
    with pytest.raises(UserError, match="--rescore: the candidates are in fp32 already: set --encode_precision bf16"):
        MiningSpec.from_options(options)


@pytest.mark.parametrize(
    ("machine", "flags", "target"),
    [("aarch64", set(), "arm64"), ("x86_64", {"avx512_vnni"}, "avx512_vnni"), ("x86_64", {"avx2"}, "avx2")],
)
def test_files_are_named_as_sentence_transformers_does(monkeypatch, machine, flags, target):
    monkeypatch.setattr(choice.platform, "machine", lambda: machine)
    monkeypatch.setattr(choice, "_cpu_flags", lambda: flags)
    assert BackendChoice("onnx", "int8").file == f"onnx/model_qint8_{target}.onnx"
    assert BackendChoice("onnx", "fp32").file == "onnx/model.onnx"
    assert BackendChoice("openvino", "int8").file == "openvino/openvino_model_qint8_quantized.xml"
    assert BackendChoice("openvino", "bf16").file == BackendChoice("openvino", "fp32").file
