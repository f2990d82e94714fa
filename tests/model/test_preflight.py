"""Check of a model in the driver: configuration and tokenizer are built without weights, words are counted."""

import json
from pathlib import Path

import pytest
from tiny import KINDS, SENTENCE, make_classifier, make_tiny

from raybge import Encoder
from raybge.cli.console import Console
from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions, PretrainOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.encoding.spec import EncodingSpec
from raybge.evaluation.spec import EvaluationSpec
from raybge.mining.spec import MiningSpec
from raybge.model.folder import FolderSettings
from raybge.model.loading import ModelLocation, make_empty
from raybge.model.preflight import check_model
from raybge.search.inputs import _check_models, survey_input
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.pretrain_spec import PretrainSpec
from raybge.util.errors import UserError

UNKNOWN = "the tokenizer does not know 100% of the words of a sample of the data: .* --allow_unknown_tokens True"


def configure(folder: str, **fields) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": "1e-12"}, "'layer_norm_eps' expected float, got str"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true: expected an integer"),
        ({"num_attention_heads": "2"}, "'num_attention_heads' expected int, got str"),
        ({"max_position_embeddings": [32]}, "'max_position_embeddings' expected int, got list"),
        ({"hidden_dropout_prob": "0.1"}, "'hidden_dropout_prob'"),
        ({"use_cache": "yes"}, "'use_cache' expected bool, got str"),
        ({"hidden_act": "none"}, "cannot be built from its config.json: KeyError"),
        ({"num_attention_heads": 3}, "cannot be built from its config.json"),
        ({"dtype": "fp99"}, "config.json: AttributeError"),
        ({"model_type": "no-such"}, "model type"),
        ({"vocab_size": 8}, "has the token .* with the id 8"),
    ],
)
def test_wrong_values_of_the_configuration_are_errors(tiny, fields, message):
    folder = tiny()
    check_model(folder)
    configure(folder, **fields)
    (Path(folder) / "model.safetensors").unlink()  # it is not read
    with pytest.raises(UserError, match=message) as caught:
        check_model(folder)
    assert folder in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_has_no_weights(tiny, kind):
    folder = tiny(kind)
    network = make_empty(ModelLocation(folder, FolderSettings()))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.num_parameters() == Encoder(folder, devices="cpu").model.backbone.num_parameters()
    check_model(folder, lambda: [SENTENCE])


def test_a_few_unknown_words_say_nothing(tiny):
    folder = tiny("bert")
    check_model(folder, lambda: ["zebra", "okapi"])
    with pytest.raises(UserError, match=UNKNOWN):
        check_model(folder, lambda: ["zebra", "okapi"] * 10)


# --- in the commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> dict[str, str]:
    """Files of rows by name: of known words, and of unknown ones."""
    files = {}
    for name, text in (("known", SENTENCE), ("unknown", "zebra quagga okapi")):
        path = tmp_path / f"{name}.jsonl"
        row = {"query": text, "pos": [text], "neg": [text], "text": text, "id": "1"}
        path.write_text((json.dumps(row) + "\n") * 10)
        files[name] = str(path)
    return files


def check_training(kind, task, model, file, **flags):
    options = build_options(kind, {"model_name_or_path": model, "train_data": [file], "output_dir": "o", **flags})
    spec = task.from_options(options)
    spec.check_model(survey(list_files([file], "--train_data"), 1 << 20, spec.row_parser))


def check_search(spec, folder):
    _check_models(spec, [survey_input(source, str(folder), "stop", Console()) for source in spec.inputs])


@pytest.mark.parametrize(("command", "task"), [(TrainOptions, FinetuneSpec), (PretrainOptions, PretrainSpec)])
def test_training_checks_the_words(tmp_path, rows, command, task):
    model = make_tiny(tmp_path / "model", mask=True)
    check_training(command, task, model, rows["known"])
    with pytest.raises(UserError, match=UNKNOWN):
        check_training(command, task, model, rows["unknown"])
    check_training(command, task, model, rows["unknown"], allow_unknown_tokens=True)


def test_mining_and_encoding_check_the_words(tmp_path, rows):
    model = make_tiny(tmp_path / "model")
    common = {"model_name_or_path": model, "output_file": str(tmp_path / "out.jsonl")}
    for command, spec in ((MineOptions, MiningSpec), (EncodeOptions, EncodingSpec)):
        for file, flags in (("known", {}), ("unknown", {"allow_unknown_tokens": True})):
            options = build_options(command, {**common, "input_file": [rows[file]], **flags})
            check_search(spec.from_options(options).inputs, tmp_path)
        options = build_options(command, {**common, "input_file": [rows["unknown"]]})
        with pytest.raises(UserError, match=UNKNOWN):
            check_search(spec.from_options(options).inputs, tmp_path)


def test_evaluation_hands_its_models_and_the_flag_on(tmp_path, rows):
    models = [make_tiny(tmp_path / name) for name in ("one", "two")]
    data = {"corpus_data": [rows["known"]], "query_data": [rows["known"]]}
    options = {"model_name_or_path": models[0], "compare": [models[1]], **data}
    spec = EvaluationSpec.from_options(build_options(EvaluateOptions, options))
    assert [each.encoder.model_name_or_path for each in spec.models] == models and not spec.allow_unknown_tokens
    spec = EvaluationSpec.from_options(build_options(EvaluateOptions, {**options, "allow_unknown_tokens": True}))
    assert spec.allow_unknown_tokens


def test_mining_checks_the_cross_encoder(tmp_path, rows):
    model, reranker = make_tiny(tmp_path / "model"), make_classifier(tmp_path / "reranker")
    configure(reranker, layer_norm_eps="1e-12")
    options = {"model_name_or_path": model, "cross_encoder": reranker, "output_file": str(tmp_path / "out.jsonl")}
    spec = MiningSpec.from_options(build_options(MineOptions, {**options, "input_file": [rows["known"]]}))
    with pytest.raises(UserError, match=f"{reranker} does not load: config.json: .*'layer_norm_eps' expected float"):
        check_search(spec.inputs, tmp_path)


def test_training_checks_the_guide(tmp_path, rows):
    model, guide = make_tiny(tmp_path / "model"), make_tiny(tmp_path / "guide")
    configure(guide, vocab_size=8)
    with pytest.raises(UserError, match=f"the model {guide} has embeddings for ids below 8"):
        flags = {"guide_model": guide, "false_negative_margin": 0.1}
        check_training(TrainOptions, FinetuneSpec, model, rows["known"], **flags)
