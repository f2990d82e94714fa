"""The files of a trained model that are meant to be published: complete, and without private texts and paths."""

import json
import shutil
import socket
from getpass import getuser
from pathlib import Path

import pytest
import sentence_transformers
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from process_runtime import use_processes

from raybge.model.upload import model_files, upload_command
from raybge.train import main

SECRET, HELD_OUT = "hf_secrettoken", "heldouttext"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> tuple[Path, str]:
    """A finished run with checkpoints, a token, held-out queries and a base model with a card; and its screen."""
    folder = tmp_path_factory.mktemp("privatefolder")
    shutil.copytree(tiny_model, folder / "base")
    card = "---\nbase_model: BAAI/bge-small-en-v1.5\nlicense: mit\nlanguage: en\n---\n\n# Base\n"
    (folder / "base" / "README.md").write_text(card)
    rows = [{"query": f"ak al {i}", "pos": ["am an ao"], "neg": ["ap aq"]} for i in range(6)]
    held_out = [{"query": f"{HELD_OUT} {i} ak", "pos": [f"{HELD_OUT} {i} am"]} for i in range(4)]
    for name, content in (("train", rows), ("dev", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    flags = f"--model_name_or_path {folder}/base --train_data {folder}/train.jsonl --eval_data {folder}/dev.jsonl "
    flags += f"--output_dir {folder}/out --token {SECRET} --num_workers 1 --per_device_train_batch_size 3 "
    flags += "--num_train_epochs 1 --save_steps 1 --logging_steps 1 --language en de --log_rows"
    with use_processes():
        assert main(flags.split()) == 0
    return folder / "out", str(folder)


def test_they_hold_no_path_token_or_held_out_text(run):
    output, folder = run
    private = [folder, "privatefolder", SECRET, HELD_OUT, str(Path.home()), socket.gethostname()]
    private += [getuser()] * (len(getuser()) > 4)  # «root» is a word like others
    content = {name: (output / name).read_bytes() for name in model_files(output)}
    assert [(name, word) for name, data in content.items() for word in private if word.encode() in data] == []
    # What is not published has them.
    report = (output / "report.html").read_text()
    assert HELD_OUT in report and folder in report and (output / "checkpoint-2").is_dir()
    assert all(name in upload_command(output) for name in content) and "report.html" not in upload_command(output)


def test_they_are_a_whole_model(run, tmp_path):
    output, _ = run
    for name in model_files(output):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(output / name, tmp_path / name)
    texts = ["ak al", "am an ao"]
    alone, original = (
        sentence_transformers.SentenceTransformer(str(path), device="cpu") for path in (tmp_path, output)
    )
    assert alone.encode(texts).tolist() == original.encode(texts).tolist()
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert config["__version__"]["sentence_transformers"] == sentence_transformers.__version__


def test_the_card_is_that_of_the_run(run):
    output, _ = run
    card = ModelCard.load(output / "README.md", ignore_metadata_errors=False)
    data = card.data
    assert (data.base_model, data.license, data.language) == ("BAAI/bge-small-en-v1.5", "mit", ["en", "de"])
    measured = json.loads((output / "train_results.json").read_text())
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert {each.metric_type: each.metric_value for each in results} == {
        name: measured[f"eval_{name}"] for name in ("nDCG@10", "MRR@10")
    }
    assert results[0].dataset_args == {"queries": 4} and results[0].dataset_name == "dev.jsonl"
    low, high = results[0].metric_args["difference_95_percent_interval"]
    assert low <= results[0].metric_args["difference"] <= high
    for text in (
        "trained lengths | queries up to 32 tokens, passages up to 64 tokens",
        "maximum length | 16 tokens",
        "| query | 6 | 5 |",  # two words, the number and two special tokens
        "| steps | 2 of 3 groups |",
        "| hardware | 1 × ",
        "| `learning_rate` | `5e-05` |",
        "| ak al 0 | am an ao | ap aq |",
        "4 held-out queries of dev.jsonl",
        "@misc{xiao2023cpack",
    ):
        assert text in card.text, text
