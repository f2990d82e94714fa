"""`raybge.pretrain` end to end: one worker compared with two, resuming, and loading the result elsewhere."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from process_runtime import use_processes
from safetensors.torch import load_file
from tiny import WORDS, configure_tokenizer, make_tiny

from raybge import pretrain_retromae
from raybge.cli.options import PretrainOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.data.datasets import build_data_sets
from raybge.data.groups import parse_passage
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.pretrain import main
from raybge.training.tasks.pretrain_spec import PretrainSpec

ROWS, UPDATES = 22, 8  # two epochs of four steps

pytestmark = pytest.mark.usefixtures("worker_processes")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Texts of different lengths; no dropout, so that runs on different numbers of workers can be compared."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS[:-1], random.integers(1, 40))) for _ in range(ROWS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return dict(
        model_name_or_path=masked_model(folder / "tiny"),
        train_data=[str(folder / "texts.jsonl")],
        global_batch_size=6,
        max_seq_length=24,
        learning_rate=0.2,
        optim="sgd",  # Adam turns the noise of zero gradients, such as those of a key's bias, into steps
        num_train_epochs=2,
        logging_steps=1,
        cpus_per_worker=1,
        save_steps=3,
        pretrain_method="dupmae",
    )


def masked_model(folder: Path, **more) -> str:
    path = make_tiny(folder, dropout=0.0, head=True, words=[*WORDS, "[MASK]"], **more)
    configure_tokenizer(path, mask_token="[MASK]")
    return path


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory) -> dict[int, Path]:
    """Runs on one worker and on two."""
    folder = tmp_path_factory.mktemp("runs")
    with use_processes():
        for workers in (1, 2):
            result = pretrain_retromae(**flags, output_dir=str(folder / str(workers)), num_workers=str(workers))
            assert result.metrics["steps"] == UPDATES
    return {workers: folder / str(workers) for workers in (1, 2)}


def losses(output: Path) -> list[float]:
    return [e["loss"] for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def test_two_workers_train_like_one(flags, runs):
    one, two = (load_file(runs[workers] / "encoder_model" / "model.safetensors") for workers in (1, 2))
    begin = load_file(Path(flags["model_name_or_path"]) / "model.safetensors")
    for name, value in one.items():
        moved = (value - begin[f"bert.{name}"]).norm()
        assert (two[name] - value).norm() <= 1e-4 * moved + 1e-7, name
    assert (one["encoder.layer.0.output.dense.weight"] - begin["bert.encoder.layer.0.output.dense.weight"]).norm() > 0.1
    np.testing.assert_allclose(losses(runs[1]), losses(runs[2]), rtol=1e-4)
    assert np.mean(losses(runs[1])[-2:]) < losses(runs[1])[0]


def test_a_resumed_run_continues_with_its_decoder(flags, runs, tmp_path, capfd):
    """Stopped half-way and resumed: head, decoder and optimizer come from the checkpoint."""
    run_flags = dict(flags, output_dir=str(tmp_path / "out"), num_workers="1")
    schedule = dict(lr_scheduler_type="constant")
    pretrain_retromae(**{**run_flags, **schedule, "max_steps": 3})
    (tmp_path / "out" / "train_results.json").unlink()
    pretrain_retromae(**run_flags, **schedule, resume=True)
    assert "continues from" in capfd.readouterr().out
    pretrain_retromae(**{**run_flags, **schedule, "output_dir": str(tmp_path / "whole")})
    ours, theirs = (load_file(tmp_path / n / "encoder_model" / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())
    last = tmp_path / "out" / f"checkpoint-{UPDATES}"
    assert (last / "pretraining.safetensors").exists()
    assert not (tmp_path / "out" / "encoder_model" / "pretraining.safetensors").exists()


def test_the_encoder_is_the_mean_of_its_checkpoints(flags, tmp_path):
    """Against the files of the checkpoints after updates 6 and 8; the exponential average lies elsewhere."""
    encoders = []
    for name, average in (("mean", {"average_checkpoints": 2}), ("ema", {"ema": 0.5})):
        pretrain_retromae(**flags, **average, output_dir=str(tmp_path / name), num_workers="1")
        encoders.append(load_file(tmp_path / name / "encoder_model" / "model.safetensors"))
    saved = [load_file(tmp_path / "mean" / f"checkpoint-{step}" / "model.safetensors") for step in (6, 8)]
    for name, value in encoders[0].items():
        torch.testing.assert_close(value, (saved[0][name] + saved[1][name]) / 2, atol=1e-7, rtol=1e-6)
    for others in (encoders[1], *saved):
        assert any((value - others[name]).abs().max() > 1e-4 for name, value in encoders[0].items())


def test_the_encoder_opens_in_other_libraries(runs, flags):
    import transformers
    from sentence_transformers import SentenceTransformer

    from raybge import Encoder

    folder = runs[1] / "encoder_model"
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "pooler" not in name] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    texts = [" ".join(WORDS[:5]), " ".join(WORDS[3:9])]
    ours = Encoder(str(folder), devices="cpu").encode(texts)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "pre-trained for retrieval" in card and "RetroMAE" in card


def test_the_report_counts_texts(runs):
    text = (runs[1] / "report.html").read_text()
    assert "texts per second" in text and "groups" not in text
    assert "pretrain_method" in text and "dupmae" in text


def test_the_plan_describes_method_and_model(flags, tmp_path, capfd):
    run_flags = {**flags, "num_workers": "1", "dry_run": True, "output_dir": str(tmp_path / "out")}
    pretrain_retromae(**run_flags)
    plan = capfd.readouterr().out
    assert "22 texts an epoch" in plan and "4 steps an epoch of 6 texts; DupMAE, 30% of the words masked" in plan
    embedding = make_tiny(tmp_path / "embedding", words=[*WORDS, "[MASK]"])
    configure_tokenizer(embedding, mask_token="[MASK]")
    pretrain_retromae(**{**run_flags, "model_name_or_path": embedding})
    assert "no language-modeling head: it gets a new one, tied to its embeddings" in capfd.readouterr().out


def argv(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name_or_path": None}, "missing: --model_name_or_path, or --config_name and --tokenizer_name"),
        ({"encoder_mlm_probability": 1.5}, "--encoder_mlm_probability must be above 0 and below 1, found 1.5"),
        ({"max_seq_length": 2}, "--max_seq_length must be at least 3"),
        ({"pretrain_method": "retro"}, "--pretrain_method"),
        ({"bow_loss_weight": 0}, "--bow_loss_weight must be above 0"),
        ({"eval_strategy": "steps"}, "--eval_strategy is not supported by raybge.pretrain"),
        ({"global_batch_size": 0}, "--global_batch_size must be at least 1"),
        ({"encoder_mlm_prob": 0.3}, "encoder_mlm_prob"),
    ],
)
def test_wrong_flags_are_named(flags, tmp_path, capfd, changed, message):
    run_flags = {**flags, "output_dir": str(tmp_path / "out"), **changed}
    assert main(argv({name: value for name, value in run_flags.items() if value is not None})) == 2
    assert message in capfd.readouterr().err


def test_a_row_without_text_and_a_tokenizer_without_mask_are_named(flags, tmp_path, capfd):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a lane"}\n{"text": "  "}\n{"texts": "a row"}\n')
    run_flags = {**flags, "output_dir": str(tmp_path / "out"), "num_workers": 1}
    assert main(argv({**run_flags, "train_data": [str(path)]})) == 2
    message = capfd.readouterr().err
    assert "texts.jsonl:2" in message and "texts.jsonl:3" in message
    assert main(argv({**run_flags, "model_name_or_path": make_tiny(tmp_path / "plain", head=True)})) == 2
    assert "has no mask token" in capfd.readouterr().err


def test_a_new_head_starts_with_the_frequency_of_words(flags, tmp_path):
    """The first step's loss, encoder's and decoder's together, is below that of a guess between two words."""
    random = np.random.default_rng(1)
    rows = [{"text": " ".join(random.choice(["lane", "row"], 12, p=[0.98, 0.02]))} for _ in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_flags = {**flags, "train_data": [str(tmp_path / "texts.jsonl")], "num_workers": "1", "max_steps": 1}
    folder = run_flags.pop("model_name_or_path")
    run_flags |= {"pretrain_method": "retromae", "save_strategy": "no", "config_name": folder, "tokenizer_name": folder}
    pretrain_retromae(**run_flags, output_dir=str(tmp_path / "out"))
    assert losses(tmp_path / "out")[0] < 2 * np.log(2)


def test_only_a_new_head_counts_words_of_the_texts(flags, tmp_path):
    """The head is new if the model is, or if the model has none."""
    (tmp_path / "texts.jsonl").write_text('{"text": "lane lane row"}\n' * 20)
    rows = survey(list_files(str(tmp_path / "texts.jsonl"), "--train_data"), 100, parse_passage)
    with_head = flags["model_name_or_path"]
    bare = make_tiny(tmp_path / "bare", words=[*WORDS, "[MASK]"])
    configure_tokenizer(bare, mask_token="[MASK]")
    models = [
        {"model_name_or_path": with_head},
        {"model_name_or_path": bare},
        {"config_name": with_head, "tokenizer_name": with_head},
    ]
    biases = []
    for names in models:
        options = build_options(PretrainOptions, {**names, "train_data": ["d"], "output_dir": "o"})
        task = PretrainSpec.from_options(options).task(rows, build_data_sets(rows, 100))
        components = task.build(SimpleNamespace(device="cpu"))
        biases.append(components.model.head.get_output_embeddings().bias.detach())
    own = load_file(Path(with_head) / "model.safetensors")["cls.predictions.bias"]
    assert torch.equal(biases[0], own)
    tokenizer = components.encoder.tokenizer
    lane, row, other = (tokenizer.convert_tokens_to_ids(word) for word in ("lane", "row", "block"))
    for bias in biases[1:]:
        share = bias.exp().numpy()
        assert share.sum() == pytest.approx(1) and share[lane] == pytest.approx(0.95 * 2 / 3 + share[other], rel=1e-4)
        assert share[row] == pytest.approx(0.95 / 3 + share[other], rel=1e-4)


OWN = ("max_seq_length", "encoder_mlm_probability", "decoder_mlm_probability", "pretrain_method", "bow_loss_weight")


@pytest.mark.parametrize("name", [*OWN, "config_name", "tokenizer_name", "cache_dir", "token", "trust_remote_code"])
def test_every_flag_of_its_own_changes_the_spec(name):
    other = {"pretrain_method": "dupmae", "max_seq_length": 7, "trust_remote_code": True}
    plain = build_options(PretrainOptions, {"model_name_or_path": "m", "train_data": ["d"], "output_dir": "o"})
    kind = declared_flags(PretrainOptions)[name].kind
    changed = replace(plain, **{name: other.get(name, 0.25 if kind == "float" else "other")})
    specs = [PretrainSpec.from_options(options) for options in (plain, replace(plain), changed)]
    assert specs[0] == specs[1] != specs[2]
