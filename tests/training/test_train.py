"""Training: order, objective, result and errors; with Ray Train what it reads, and three workers."""

import gzip
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
from process_runtime import use_processes
from tiny import make_tiny

from raybge.data.collate import GroupTokenizer
from raybge.data.datasets import build_data_sets
from raybge.data.groups import parse_group
from raybge.data.order import Order
from raybge.data.prompts import Instructions
from raybge.data.source_files import list_files
from raybge.data.stream import StepStream
from raybge.data.survey import survey
from raybge.data.tokenize import TextTokenizer
from raybge.data.transcode import transcode
from raybge.model.encoder import Encoder
from raybge.train import finetune, main

WORDS = [
    "what",
    "is",
    "a",
    "lane",
    "row",
    "block",
    "of",
    "the",
    "text",
    "that",
    "we",
    "read",
    "and",
    "sort",
    "by",
    "length",
    "in",
    "chunks",
    "on",
    "one",
    "node",
]
ROWS, BATCH = 50, 6  # an epoch is 9 steps
STEPS, RATE = 72, 3e-4  # of the runs that are compared


def group(i: int) -> dict:
    random = np.random.default_rng(i)

    def text(n: int) -> str:
        return " ".join(random.choice(WORDS, n))

    return {
        "query": text(3) + f" {i}",
        "pos": [text(8)],
        "neg": [text(8) for _ in range(i % 4)],
        "extra": {"rides": "along"},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a plain and a compressed file, 50 groups in all."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(group(i)) + "\n" for i in range(ROWS)]
    (folder / "a.jsonl").write_text("".join(lines[:30]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as compressed:
        compressed.writelines(lines[30:])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Without dropout, so that runs on different numbers of workers can be compared."""
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dropout=0.0)


# --- the order, on real workers ---------------------------------------------------------------------------------------


def read_shares(config: dict) -> None:
    """Read the steps of this Train worker as training does, for each reading with its number of workers."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    for name, parts, world, start in config["readings"]:
        if rank < world:
            stream = StepStream(*parts, rank, world, 1, start_step=start)
            rows = [item["batch"].rows for item in stream]
            (config["folder"] / f"{name}-{rank}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def parts(data, tiny, tmp_path_factory):
    """Survey, order and tokenizer of the 50 groups, in batches of 6: the last step has 2 rows."""
    from transformers import AutoTokenizer

    files = transcode(list_files(str(data), "--train_data"), str(tmp_path_factory.mktemp("plain")))
    rows = survey(files, 256, parse_group)
    assert len(rows.blocks) > 10
    texts = TextTokenizer(AutoTokenizer.from_pretrained(tiny), Instructions(), 8, 12)
    tokenizer = GroupTokenizer(texts, 3, seed=1)
    return rows, Order(rows.rows, BATCH, seed=1), tokenizer


@pytest.fixture(scope="module")
def separate(parts):
    """The same in steps of one data set each: 30 and 20 rows."""
    rows, _, tokenizer = parts
    order = Order(rows.rows, BATCH, 1, False, build_data_sets(rows, 10**8, together=True).mixture)
    return rows, order, tokenizer


@pytest.fixture(scope="module")
def global_batches(parts, separate, tmp_path_factory, ray_cluster) -> dict[str, list[list[tuple[int, int]]]]:
    """The rows of each step, by reading: 1 to 4 workers, and from the middle."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    readings = [(f"{world}", parts, world, 0) for world in (1, 2, 3, 4)]
    readings += [("middle", parts, 3, 5)]
    readings += [("separate 1", separate, 1, 0), ("separate 3", separate, 3, 0), ("separate middle", separate, 3, 4)]
    folder = tmp_path_factory.mktemp("read")
    DataParallelTrainer(
        read_shares,
        train_loop_config={"readings": readings, "folder": folder},
        scaling_config=ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(folder / "ray"), name="read"),
    ).fit()
    steps = {}
    for name, _, world, _ in readings:
        shares = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]
        steps[name] = [[tuple(row) for share in step for row in share] for step in zip(*shares, strict=True)]
    return steps


def test_batches_of_one_data_set_are_the_same_for_any_number_of_workers(separate, global_batches):
    """`--same_dataset_within_batch`: 30 and 20 rows in steps of 6, all rows of a step from one file."""
    _, order, _ = separate
    alone = global_batches["separate 1"]
    assert [len(step) for step in alone] == [order.size(0, step) for step in range(9)]
    assert sorted(len(step) for step in alone) == [2] + [6] * 8
    assert all(len({file for file, _ in step}) == 1 for step in alone)
    assert len({row for step in alone for row in step}) == ROWS
    assert global_batches["separate 3"] == alone
    assert global_batches["separate middle"] == alone[4:]


def test_global_batches_are_the_same_for_any_number_of_workers(global_batches):
    alone = global_batches["1"]
    rows = [row for step in alone for row in step]
    assert len(rows) == len(set(rows)) == ROWS
    assert [len(step) for step in alone] == [6] * 8 + [2]
    assert global_batches["2"] == global_batches["3"] == global_batches["4"] == alone
    assert global_batches["middle"] == alone[5:]


# --- training ---------------------------------------------------------------------------------------------------------


def flags_of(tiny_model: str, data: Path, output: Path, **more) -> dict:
    flags = dict(
        model_name_or_path=tiny_model,
        train_data=[str(data)],
        output_dir=str(output),
        global_batch_size=BATCH,
        train_group_size=3,
        learning_rate=1e-3,
        num_train_epochs=2,
        temperature=0.1,
        logging_steps=1,
        cpus_per_worker=1,
        passage_max_len=16,
    )
    return flags | more


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def runs(data, tiny, tmp_path_factory, ray_cluster) -> dict[str, Path]:
    """Dropout is off in the tiny model. "one": 1 worker, a plain process; "three": 3 workers of Ray Train."""
    folder = tmp_path_factory.mktemp("runs")
    for name, workers in (("one", "1"), ("three", "3")):
        more = {"save_strategy": "epoch", "save_total_limit": 2} if name == "one" else {"save_strategy": "no"}
        more |= {"num_train_epochs": STEPS // 9, "learning_rate": RATE}
        with use_processes() if name == "one" else nullcontext():
            finetune(**flags_of(tiny, data, folder / name, num_workers=workers, **more))
    return {name: folder / name for name in ("one", "three")}


def test_three_workers_train_like_one(runs):
    """The loss of every step, including the last of each epoch: two rows, so one worker has none."""
    one, three = losses(runs["one"]), losses(runs["three"])
    assert len(one) == len(three) == STEPS
    assert three == pytest.approx(one, abs=1e-4)
    assert np.mean(one[-6:]) < 0.8 * np.mean(one[:6])
    ours, theirs = (Encoder(str(runs[name])).encode(["what is a lane", "sort by length"]) for name in ("one", "three"))
    np.testing.assert_allclose(theirs, ours, atol=2e-3)  # Adam turns the noise of zero gradients into steps


def test_the_output_folder_of_a_run(runs):
    folder = runs["one"]
    results = json.loads((folder / "train_results.json").read_text())
    assert results["steps"] == STEPS
    samples = STEPS // 9 * ROWS
    assert results["train_samples_per_second"] == pytest.approx(samples / results["train_runtime"], rel=0.05)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [f"checkpoint-{STEPS - 9}", f"checkpoint-{STEPS}"]
    assert (folder / f"checkpoint-{STEPS - 9}" / "modules.json").is_file()
    assert not list(folder.rglob("training_args.bin"))
    assert not list((folder / ".raybge").glob("*run-*"))
    assert oct((folder / "model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~umask())


def test_the_report_of_a_run_has_every_step(runs, data):
    """For any number of workers."""
    for name, workers in (("one", "1 worker<"), ("three", "3 workers<")):
        page = (runs[name] / "report.html").read_text()
        assert f"{STEPS} steps" in page and workers in page
        # worker 0 of three may have no rows in an epoch's last step
        assert re.search(rf'aria-label="learning rate[^"]* over {STEPS} points', page)
        assert "<h3>Step 1</h3>" in page and re.search(rf"<h3>Step ({STEPS}|{STEPS - (name != 'one')})</h3>", page)
        assert "is not finite" not in page
        assert all(file in page for file in ("a.jsonl", "b.jsonl.gz"))
    first, last = losses(runs["one"])[0], losses(runs["one"])[-1]
    shown = re.search(r'aria-label="loss: from (\S+) to (\S+) over', (runs["one"] / "report.html").read_text())
    assert [float(value) for value in shown.groups()] == pytest.approx([first, last], rel=1e-3)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_model_opens_in_sentence_transformers(runs, tiny):
    texts = ["what is a lane", "we read and sort the text by length"]
    ours = Encoder(str(runs["one"])).encode_corpus(texts)
    theirs = sentence_transformers.SentenceTransformer(str(runs["one"]), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    before = Encoder(tiny).encode_corpus(texts)
    assert np.abs(ours - before).max() > 1e-2


def test_adapters_of_a_decoder_are_trained_and_merged(worker_processes, data, tmp_path):
    """On two workers, which require a gradient of every adapter; model/test_lora.py tests the adapters themselves."""
    base = make_tiny(tmp_path / "base", "qwen3")
    flags = flags_of(base, data, tmp_path / "out", num_workers=2, max_steps=3, save_strategy="no")
    flags |= {"use_lora": True, "lora_rank": 4, "learning_rate": 0.01, "gradient_checkpointing": True}
    texts = ["what is a lane", "we read and sort the text by length"]
    finetune(**flags, save_merged_lora_model=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list((tmp_path / "out").glob("adapter_*"))
    ours = Encoder(str(tmp_path / "out")).encode_corpus(texts)
    peer = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(peer.encode(texts), ours, atol=1e-5)
    assert np.abs(ours - Encoder(base).encode_corpus(texts)).max() > 1e-2


# --- errors -----------------------------------------------------------------------------------------------------------


def error_message(capfd, flags: dict, code: int = 2) -> str:
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert main(argv) == code
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "bad.jsonl:2: the row must be a JSON object"),
        ('["a list"]', "bad.jsonl:2: the row must be a JSON object, found a list"),
        ('{"pos": ["p"]}', 'bad.jsonl:2: "query" must be a non-empty string'),
        ('{"query": "q"}', 'bad.jsonl:2: "pos" must be'),
        ('{"query": "q", "pos": [3]}', 'bad.jsonl:2: "pos" must be'),
        ('{"query": " ", "pos": ["p"]}', 'bad.jsonl:2: "query" must be a non-empty string'),
    ],
)
def test_bad_rows_are_named_and_the_output_stays(worker_processes, capfd, tiny, tmp_path, line, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "q", "pos": ["p"]}\n' + line + "\n")
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes").write_text("text")
    assert message in error_message(capfd, flags_of(tiny, bad, output, overwrite_output_dir=True))
    assert (output / "notes").read_text() == "text"
    assert [p.name for p in output.iterdir() if not p.name.startswith(".")] == ["notes"]


def test_bad_rows_can_be_skipped(worker_processes, capfd, tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(group(i)) + "\n" for i in range(9)) + "not json\n")
    flags = flags_of(tiny, bad, tmp_path / "out", on_bad_rows="skip", dry_run=True)
    finetune(**flags)
    shown = capfd.readouterr().out
    assert "1 invalid row skipped" in shown and "bad.jsonl:10" in shown and "9 groups" in shown
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".raybge"]  # the survey of the rows


def test_the_plan_shows_what_flags_of_data_sets_change(worker_processes, capfd, tiny, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, rows in (("a", 20), ("b", 3), ("c_no_in_batch_neg", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(group(i)) + "\n" for i in range(rows)))
    flags = flags_of(tiny, folder, tmp_path / "out", dry_run=True, overwrite_output_dir=True)

    def plan(**more) -> list[str]:
        finetune(**flags, **more)
        lines = capfd.readouterr().out.splitlines()
        return [" ".join(line.replace(f"{folder}/", "").split()) for line in lines if line.startswith(("data:", "  "))]

    assert "27 groups an epoch from 3 files; 5 steps" in plan()[0]
    assert plan()[1:] == [
        "a.jsonl: 20 groups",
        "b.jsonl: 3 groups",
        "c_no_in_batch_neg.jsonl: 4 groups; own negatives only",
    ]
    assert "6 steps" in plan(same_dataset_within_batch=True)[0]
    assert plan(small_threshold=5)[1:] == ["a.jsonl: 20 groups", "(2 small files): 7 groups"]
    assert plan(small_threshold=5, drop_threshold=8)[2] == "dropped by --drop_threshold: (2 small files): 7 groups"
    assert plan(max_example_num_per_dataset=5)[1] == "a.jsonl: 5 groups; 5 of 20 rows"
    assert plan(dataset_weights=[f"{folder}/b.jsonl=2.5"])[2] == "b.jsonl: 3 groups; 8 per epoch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_data": "nowhere.jsonl"}, "--train_data"),
        ({"dataset_weights": "a=b"}, "--dataset_weights a=b: expected NAME=WEIGHT"),
        ({"dataset_weights": "a.jsnl=2"}, "a.jsonl?"),
        ({"small_threshold": -1}, "--small_threshold must be at least 0"),
        ({"max_example_num_per_dataset": 0}, "--max_example_num_per_dataset must be at least 1"),
        ({"shuffle_ratio": 1.5}, "--shuffle_ratio must be from 0 to 1"),
        ({"temperature": 0}, "--temperature must be above 0"),
        ({"train_group_size": 0}, "--train_group_size must be at least 1"),
        ({"query_instruction_format": "{}"}, "query_instruction_format"),
        ({"passage_instruction_for_retrieval": "x", "passage_instruction_format": "{}{}!"}, "stores only prefixes"),
        ({"num_workers": 3, "global_batch_size": 2}, "at most 2"),
        ({"num_workers": 20}, "do not fit"),
        ({"global_batch_size": 64, "dataloader_drop_last": True}, "less than one global batch"),
        ({"output_dir": "s3://bucket/model"}, "--output_dir"),
        ({"model_name_or_path": "."}, "--model_name_or_path"),
        ({"learning_rat": 1e-5}, "did you mean --learning_rate?"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "--warmup_ratio"),
        ({"seed": -1}, "--seed"),
        ({"lora_rank": 8}, "--lora_rank requires --use_lora"),
        ({"save_merged_lora_model": True}, "requires --use_lora"),
        ({"use_lora": True, "lora_rank": 0}, "--lora_rank must be at least 1"),
        ({"use_lora": True, "fix_position_embedding": True}, "--fix_position_embedding"),
        ({"use_lora": True, "config_name": "other"}, "--config_name"),
    ],
)
def test_wrong_flags_are_named(worker_processes, capfd, tiny, data, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_message(capfd, flags_of(tiny, data, tmp_path / "out", **flags))


def test_an_output_folder_that_is_not_empty_stays(worker_processes, capfd, tiny, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    assert "--overwrite_output_dir" in error_message(capfd, flags_of(tiny, data, tmp_path / "out"))


def test_a_users_error_in_a_worker_is_one_message_without_restarts(worker_processes, capfd, tiny, data, tmp_path):
    """Only transformers, inside of the worker, can tell that an optimizer does not exist."""
    message = error_message(capfd, flags_of(tiny, data, tmp_path / "out", optim="nonsense", max_failures=-1))
    assert "nonsense" in message and message.count("\n") < 12
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_learning_rate_falls_linearly_to_zero(runs):
    """The schedule that transformers documents as its default."""
    history = json.loads((runs["one"] / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([RATE * (STEPS - step) / STEPS for step in range(STEPS)], abs=1e-9)
