"""Specs of models: equal to the constructors' keyword arguments, read once from options, hashable and picklable."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
from tiny import make_tiny

from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions
from raybge.cli.parser import build_options
from raybge.model.encoder import Encoder
from raybge.model.lora import Lora
from raybge.model.reranker import Reranker
from raybge.model.spec import EncoderSpec, RerankerSpec


@pytest.mark.parametrize("spec, model", [(EncoderSpec, Encoder), (RerankerSpec, Reranker)])
def test_a_spec_has_the_constructors_arguments_and_defaults(spec, model):
    ours = {field.name: field.default for field in fields(spec)}
    parameters = list(inspect.signature(model).parameters.values())
    expected = {p.name: MISSING if p.default is p.empty else p.default for p in parameters}
    assert list(ours) == list(expected) and ours == expected


def test_fields_are_read_from_a_commands_options(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = dict(input_file=["in.jsonl"], output_file="out.jsonl", query_max_len=7, passage_max_len=9, batch_size=3)
    options = build_options(MineOptions, dict(flags, model_name_or_path="folder", cross_encoder="org/reranker"))
    spec = EncoderSpec.from_options(options, passage_max_length=None)
    assert spec.model_name_or_path == str(tmp_path / "folder")
    assert (spec.query_max_length, spec.passage_max_length, spec.batch_size) == (7, None, 3)
    reranker = RerankerSpec.from_options(options, max_length=11)
    assert reranker.model_name_or_path == "org/reranker"
    assert (reranker.batch_size, reranker.max_length, reranker.use_fp16) == (256, 11, True)


def test_one_length_for_all_texts_is_that_of_queries_and_passages():
    flags = dict(input_file=["in.jsonl"], output_file="out.npy", model_name_or_path="org/model", max_length=5)
    spec = EncoderSpec.from_options(build_options(EncodeOptions, flags))
    assert (spec.query_max_length, spec.passage_max_length) == (5, 5)


def test_options_without_a_field_leave_its_default():
    options = build_options(EvaluateOptions, dict(encoder="org/model", corpus_data=["c"], query_data=["q"]))
    assert EncoderSpec.from_options(options).query_instruction_for_retrieval is None
    assert EncoderSpec.from_options(SimpleNamespace(model_name_or_path=None)) == EncoderSpec("")


def test_specs_are_hashable_and_picklable(monkeypatch):
    monkeypatch.setattr("raybge.model.lora.require_peft", lambda subject: None)
    spec = EncoderSpec("org/model", devices=["cpu", "cpu"], lora=Lora(4), token="secret")
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert "secret" not in repr(spec)


def test_a_spec_loads_its_model(tmp_path):
    spec = EncoderSpec(make_tiny(tmp_path / "tiny", "bert"), passage_max_length=9)
    encoder = spec.load(devices="cpu", query_max_length=4)
    assert (encoder.query_max_length, encoder.passage_max_length, encoder.device.type) == (4, 9, "cpu")


def test_specs_need_no_torch():
    code = "import sys, raybge.model.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
