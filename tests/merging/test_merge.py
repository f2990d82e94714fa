"""Merging end to end: invalid flags, the output folder, and weights from examples and from a search on Ray."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import make_classifier, make_tiny, perturb_weights

import raybge
from raybge.cli.console import Console
from raybge.cli.options import EvaluateOptions, MergeOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.evaluation.run import evaluate
from raybge.merge import main, mix_models, mix_models_with_data
from raybge.merging import alignment
from raybge.merging.example_loss import ExampleSet
from raybge.model.folder import FolderSettings, read_settings, write_settings
from raybge.util.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory, words) -> list[str]:
    """Two embedding models of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": 4 + len(words), "hidden_size": 32, "intermediate_size": 64}
    folders = []
    for i, name in enumerate(("tuned", "base")):
        perturb_weights(make_tiny(folder / name, pooler=False, words=words, **size), i)
        write_settings(folder / name, FolderSettings("mean", True, {"query": "ak "}, max_length=16), 32, {})
        folders.append(str(folder / name))
    return folders


def state(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def argv(models, **flags) -> list[str]:
    values = {"model_names_or_paths": models, "model_type": "encoder", **flags}
    return [
        str(word)
        for name, value in values.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def assert_sum(merged, models, weights):
    parts = [state(model) for model in models]
    for key, tensor in merged.items():
        expected = sum(w * part[key].double() for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(tensor.detach(), expected, atol=1e-6)


# --- explicit weights -------------------------------------------------------------------------------------------------


def test_command_without_ray_writes_a_complete_folder(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    output = tmp_path / "new/mixed"
    assert main(argv(models, weights=["0.4", "0.6"], output_path=output)) == 0
    assert_sum(state(output), models, (0.4, 0.6))
    assert {path.name for path in output.parent.iterdir()} == {"mixed"}
    text = capfd.readouterr().out
    assert "mean pooling, normalized; merge method: linear" in text
    assert "0.4000" in text and f"written: {output}" in text
    card = (output / "README.md").read_text()
    assert "| `tuned` | 0.4 |" in card and "SentenceTransformer(" in card and str(tmp_path) not in card
    page = (output / "report.html").read_text()
    assert "Merge of 2 models" in page and "Target against general" not in page
    assert oct((output / "model.safetensors").stat().st_mode & 0o777) == oct(
        (output / "config.json").stat().st_mode & 0o777
    )


@pytest.mark.parametrize("function", [raybge.mix_models, raybge.mix_models_by_layers])
def test_functions_return_the_model(models, tmp_path, function):
    """Called as in LM-Cocktail, with and without an output folder."""
    saved = function(models, "encoder", [0.5, 0.5], str(tmp_path / "mixed"))
    temporary = function(model_names_or_paths=models, model_type="encoder", weights=(0.5, 0.5))
    assert type(saved) is type(temporary) is transformers.BertModel
    for model in (saved, temporary):
        assert_sum(model.state_dict(), models, (0.5, 0.5))
    assert Path(saved.name_or_path) == tmp_path / "mixed" and not Path(temporary.name_or_path).exists()
    result = function(models, "encoder", [0.5, 0.5], str(tmp_path / "more"), return_model=False)
    more = tmp_path / "more"
    assert result == raybge.MergeResult([0.5, 0.5], model=str(more), report=str(more / "report.html"))
    assert (more / "report.html").is_file()


def test_merge_method_flags(models, tmp_path):
    flags = {"merge_method": "ties", "base_model": models[1], "ties_density": 1.0}
    merged = mix_models([models[0], models[0]], "encoder", [0.5, 0.5], str(tmp_path / "ties"), **flags)
    assert_sum(merged.state_dict(), models, (1, 0))  # two equal changes
    line = mix_models(models, "encoder", [0.5, 0.5]).state_dict()
    arc = mix_models(models, "encoder", [0.5, 0.5], merge_method="slerp").state_dict()
    assert any((arc[key] - line[key]).abs().max() > 1e-3 for key in line)


def test_dry_run_writes_nothing(models, tmp_path, capfd):
    assert main(argv(models, weights=["0.5", "0.5"], output_path=tmp_path / "mixed", dry_run="True")) == 0
    assert "models: 2, bert" in capfd.readouterr().out and not [*tmp_path.iterdir()]


# --- invalid flags ----------------------------------------------------------------------------------------------------

HALF = {"weights": ["0.5", "0.5"], "output_path": "never"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weights": ["0.5", "0.4"]}, "--weights must sum to 1, found 0.9"),
        ({"weights": ["0.5", "0.5011"]}, "--weights must sum to 1, found 1.0011"),
        ({"weights": ["0.5", "nan"]}, "argument --weights: invalid float value"),
        ({"weights": ["1"]}, "--weights: 2 models require 2 weights, found 1"),
        ({"weights": ["0.2", "0.3", "0.5"]}, "--weights: 2 models require 2 weights, found 3"),
        ({"wieghts": ["0.5", "0.5"]}, "there is no flag --wieghts; did you mean --weights?"),
        ({"model_type": "embedder"}, "argument --model_type: invalid choice"),
        ({"model_names_or_paths": ["a"]}, "--model_names_or_paths: at least 2 models are required, found 1"),
        ({"model_names_or_paths": ["./nowhere", "./nothing"]}, "--model_names_or_paths ./nowhere: no such folder"),
        ({"example_data": "x.jsonl"}, "is required, found --weights and --example_data"),
        ({"merge_method": "ties"}, "--merge_method ties and --base_model require each other"),
        ({"base_model": "x"}, "--merge_method ties and --base_model require each other"),
        (
            {"merge_method": "ties", "base_model": "x", "weights": ["1.5", "-0.5"]},
            "--weights must be at least 0 with --merge_method ties, found -0.5",
        ),
        ({"merge_method": "ties", "base_model": "x", "ties_density": 0}, "--ties_density must be above 0"),
        ({"ties_density": 0.5}, "--ties_density requires --base_model"),
        ({"temperature": 1}, "--temperature requires --example_data"),
        ({"general": "x.jsonl"}, "--general requires --search"),
        ({"num_workers": 2}, "--num_workers requires --example_data or --search"),
        ({"storage_path": "x"}, "--storage_path requires --search"),
        ({"output_path": "s3://b/x"}, "--output_path s3://b/x: URIs are not supported here"),
    ],
)
def test_invalid_flags_are_errors(models, capfd, flags, message):
    assert main(argv(flags.pop("model_names_or_paths", models), **{**HALF, **flags})) == 2
    assert re.search(message, capfd.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "is required, found none of them"),
        ({"weights": ["0.5", "0.5"]}, "--weights requires --output_path"),
        ({"example_data": "x.jsonl", "temperature": 0}, "--temperature must be above 0, found 0"),
        ({"example_data": "x.jsonl", "batch_size": 0}, "--batch_size must be at least 1"),
        ({"example_data": "x.jsonl", "max_input_length": 0}, "--max_input_length must be at least 1"),
        ({"example_data": "x.jsonl", "neg_number": -1}, "--neg_number must be at least 0"),
        (
            {"example_data": "x.jsonl", "neg_number": 3, "model_type": "decoder"},
            "--neg_number requires --model_type encoder",
        ),
        ({"example_data": "x.jsonl", "model_type": "reranker"}, "--model_type reranker has no loss on examples"),
        ({"example_data": "x.jsonl"}, "--example_data: x.jsonl: no such file or folder"),
        ({"search": "x.jsonl", "model_type": "decoder"}, "--search evaluates embedding models"),
        ({"search": "x.jsonl", "max_evaluations": 0}, "--max_evaluations must be at least 1"),
        ({"search": "x.jsonl", "general": "y.jsonl", "general_floor": 1.1}, "--general_floor must be from 0 to 1"),
        ({"search": "x.jsonl", "general_floor": 0.5}, "--general_floor requires --general"),
        ({"search": "x.jsonl"}, "--search: x.jsonl: no such file or folder"),
    ],
)
def test_invalid_weight_sources_are_errors(models, capfd, monkeypatch, flags, message):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    assert main(argv(models, **flags)) == 2
    assert re.search(message, capfd.readouterr().err)


def test_weights_may_sum_to_1_within_a_thousandth(models, tmp_path):
    merged = mix_models(models, "encoder", [0.5, 0.4991])
    assert_sum(merged.state_dict(), models, (0.5, 0.4991))


def test_flags_have_the_names_and_defaults_of_lm_cocktail():
    flags = declared_flags(MergeOptions)
    recipe = {"temperature": 5.0, "batch_size": 2, "max_input_length": 2048, "neg_number": 7}
    assert {name: flags[name].default for name in recipe} == recipe
    assert {"model_names_or_paths", "model_type", "weights", "output_path", "example_data"} <= flags.keys()


# --- the output folder ------------------------------------------------------------------------------------------------


def test_existing_model_is_replaced_only_with_overwrite(models, tmp_path, capfd):
    output = tmp_path / "mixed"
    assert main(argv(models, weights=["1", "0"], output_path=output)) == 0
    (output / "old.txt").touch()
    assert main(argv(models, weights=["0", "1"], output_path=output)) == 2
    assert "is not empty; choose another folder, or add --overwrite" in capfd.readouterr().err
    assert_sum(state(output), models, (1, 0))
    assert main(argv(models, weights=["0", "1"], output_path=output, overwrite="True")) == 0
    assert_sum(state(output), models, (0, 1))
    assert not (output / "old.txt").exists() and {path.name for path in tmp_path.iterdir()} == {"mixed"}


def test_folder_without_a_model_is_never_replaced(models, tmp_path, capfd):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    for place, message in (
        (tmp_path / "home", "contains no model (no config.json), so it is not overwritten"),
        (Path(models[0]), "would replace"),
        (Path(models[0]).parent, "would replace"),
        (tmp_path / "home/letter.txt", "is a file"),
    ):
        assert main(argv(models, weights=["0.5", "0.5"], output_path=place, overwrite="True")) == 2
        assert message in capfd.readouterr().err
    assert (tmp_path / "home/letter.txt").read_text() == "dear" and len(state(models[0])) > 10


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failed_writing_keeps_the_old_model(models, tmp_path, capfd, monkeypatch, error, code, message):
    output = tmp_path / "mixed"
    assert main(argv(models, weights=["1", "0"], output_path=output)) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    write_all = alignment.write_tensors

    def write_half(folder, slots, *more):
        write_all(folder, slots[: len(slots) // 2], *more)
        raise error

    monkeypatch.setattr(alignment, "write_tensors", write_half)
    assert main(argv(models, weights=["0", "1"], output_path=output, overwrite="True")) == code
    assert message in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"mixed"}


# --- weights from examples --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(words) -> list[dict]:
    """Groups of words in the models' vocabulary."""
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(words, 6)) for _ in range(60)]
    queries = [" ".join([*text.split()[:3], str(random.choice(words))]) for text in texts]
    return [{"query": queries[i], "pos": [texts[i]], "neg": texts[i + 20 : i + 23]} for i in range(20)]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_weights_follow_from_losses(ray_cluster, models, rows, tmp_path, capfd):
    """The function and the command compute the losses of a single process."""
    from raybge.data.groups import parse_group

    few = rows[:5]
    losses = [ExampleSet("encoder", [*map(parse_group, few)], 2, 2048, 2).loss(model, 1, "cpu") for model in models]
    weights = torch.softmax(-torch.tensor(losses) / 0.5, 0).tolist()
    assert abs(weights[0] - 0.5) > 0.01
    merged = mix_models_with_data(
        models, "encoder", few, 0.5, neg_number=2, output_path=str(tmp_path / "a"), num_workers=2
    )
    assert_sum(merged.state_dict(), models, weights)
    capfd.readouterr()
    flags = {"example_data": write(tmp_path / "few.jsonl", few), "temperature": 0.5, "neg_number": 2, "num_workers": 1}
    assert main(argv(models, **flags, output_path=tmp_path / "b")) == 0
    for key, tensor in state(tmp_path / "a").items():
        torch.testing.assert_close(state(tmp_path / "b")[key], tensor, rtol=0, atol=1e-5)
    text = capfd.readouterr().out
    card, page = ((tmp_path / "b" / name).read_text() for name in ("README.md", "report.html"))
    for loss, weight in zip(losses, weights, strict=True):
        assert f"{loss:.4f}" in text and f"{weight:.4f}" in text and f"{loss:.4g}" in card and f"{loss:.4f}" in page
    assert main(argv(models, **flags)) == 0  # without an output folder the weights are printed
    assert f"{weights[0]:.4f}" in capfd.readouterr().out


def test_weights_of_language_models_follow_from_their_outputs(ray_cluster, tmp_path):
    names = [perturb_weights(make_tiny(tmp_path / str(i), "qwen3", head=True), i) for i in range(2)]
    pairs = [{"input": "what is a lane", "output": "a row of text"}, {"input": "we sort", "output": "by length"}]
    losses = [
        ExampleSet("decoder", [("what is a lane", "a row of text"), ("we sort", "by length")]).loss(n, 1, "cpu")
        for n in names
    ]
    result = mix_models_with_data(names, "decoder", pairs, 2.0, return_model=False)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.weights == pytest.approx(torch.softmax(-torch.tensor(losses) / 2, 0).tolist(), rel=1e-4)
    assert len([*tmp_path.iterdir()]) == 2


def test_invalid_examples_are_errors(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *args: pytest.fail("Ray was started"))
    bad = write(tmp_path / "bad.jsonl", [{"query": "ak", "pos": "bl"}, {"query": "ak"}])
    assert main(argv(models, example_data=bad)) == 2
    assert 'bad.jsonl:2: "pos" must be' in capfd.readouterr().err
    with pytest.raises(UserError, match=r'example_data\[1\]: "pos" must be a non-empty string'):
        mix_models_with_data(models, "encoder", [{"query": "ak", "pos": ["bl"]}, {"query": "ak", "pos": [""]}])
    with pytest.raises(UserError, match="example_data is empty"):
        mix_models_with_data(models, "encoder", [])
    with pytest.raises(UserError, match=r'example_data\[0\]: "input" must be'):
        mix_models_with_data(models, "decoder", [{"query": "ak", "pos": ["bl"]}])
    score = make_classifier(tmp_path / "m")
    with pytest.raises(UserError, match="has no loss on examples"):
        mix_models_with_data([score, score], "reranker", [{"query": "ak", "pos": ["bl"]}])


# --- weights from a search --------------------------------------------------------------------------------------------


def test_search_chooses_the_best_candidate_above_the_floor(ray_cluster, models, rows, tmp_path, capfd):
    """Its metrics are those of raybge.evaluate on the merged model's folder."""
    target = write(tmp_path / "target.jsonl", rows[:10])
    general = write(tmp_path / "general.jsonl", rows[10:])
    corpus = write(tmp_path / "corpus.jsonl", [{"text": text} for row in rows for text in row["pos"] + row["neg"]])
    output = tmp_path / "out/mixed"
    flags = {"search": target, "search_corpus": corpus, "general": general, "max_evaluations": 4, "num_workers": 1}
    assert main(argv(models, **flags, output_path=output)) == 0
    text = capfd.readouterr().out
    own = write(tmp_path / "own.jsonl", [{"text": text} for row in rows[10:] for text in row["pos"] + row["neg"]])

    def evaluated(model, queries, passages):
        flags = {"encoder": str(model), "query_data": queries, "corpus_data": passages, "num_workers": 1, "k": 10}
        return evaluate(build_options(EvaluateOptions, flags), Console()).metrics["nDCG@10"]

    metrics = evaluated(output, target, corpus), evaluated(output, general, own)
    assert f"nDCG@10: target {metrics[0]:.4f}, general {metrics[1]:.4f}; 4 candidates evaluated" in text
    assert "--search: 10 queries, " in text and "--general: 10 queries, " in text
    weight = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(models[0]))
    assert weight in (1.0, 0.9, 0.8, 0.7)
    assert_sum(state(output), models, (weight, 1 - weight))
    page = (output / "report.html").read_text()
    assert "Target against general set" in page and "Candidates" in page and "candidates evaluated" in page
    assert "Determined by a search that evaluated 4 candidates" in (output / "README.md").read_text()
    assert read_settings(str(output)).prompts["query"] == "ak "
    assert [path.name for path in output.parent.iterdir()] == ["mixed"], "a candidate was not removed"


def test_invalid_search_data_is_an_error(ray_cluster, models, rows, tmp_path, capfd):
    good, bad = write(tmp_path / "good.jsonl", rows), write(tmp_path / "bad.jsonl", [*rows, {"query": "ak"}])
    assert main(argv(models, search=bad)) == 2
    assert 'bad.jsonl:21: "pos" must be' in capfd.readouterr().err
    assert main(argv(models, search=good, search_corpus="nowhere.jsonl")) == 2
    assert "--search_corpus: nowhere.jsonl: no such file or folder" in capfd.readouterr().err
    assert main(argv(models, search=good, dry_run="True", num_workers=1)) == 0
    assert "--search: 20 queries" in capfd.readouterr().out


def test_interrupt_leaves_no_files(models, tmp_path):
    """A real process, interrupted while it writes."""
    code = (
        "import signal, sys, time; from raybge.merging import alignment; from raybge.merge import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore\n"
        "write = alignment.write_tensors\n"
        "def slow(*args): write(*args); print('half', flush=True); time.sleep(60)\n"
        "alignment.write_tensors = slow\n"
        "raise SystemExit(main())"
    )
    flags = argv(models, weights=["0.5", "0.5"], output_path=tmp_path / "mixed", verbose="True")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", code, *flags], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if line == "half\n":
            break
    assert [path.name.split(".part-")[0] for path in tmp_path.iterdir()] == ["mixed"]
    run.send_signal(signal.SIGINT)
    run.stdout.read()
    assert run.wait(timeout=60) == 130 and not [*tmp_path.iterdir()]
