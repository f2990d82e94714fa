"""Runs with --batch_by similarity: equal for one, two and three workers, after a resume and again; wrong flags."""

import json
from pathlib import Path

import numpy as np
import pytest
from faulty_runs import WORDS, assert_same_model, full_disk_after_step, make_flags
from tiny import make_tiny

from raybge.cli.options import PretrainOptions, TrainOptions
from raybge.cli.parser import build_options
from raybge.data.order import Order
from raybge.model.encoder import Encoder
from raybge.model.model_identity import model_identity
from raybge.search.metadata import metadata_path
from raybge.train import finetune
from raybge.training import similar_batches
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.training.row_records import steps
from raybge.training.similarity_spec import SimilaritySpec
from raybge.training.tasks.objective_spec import ObjectiveSpec
from raybge.util.errors import UserError

TOPICS = 4
SIMILAR = {"batch_by": "similarity", "batch_clusters": TOPICS, "log_rows": True}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Flags of a run of two workers on 48 groups: each query repeats the words of one of four topics."""
    folder = tmp_path_factory.mktemp("inputs")
    flags = make_flags(folder) | {"global_batch_size": 6, "num_train_epochs": 1}

    def group(i: int) -> dict:
        random = np.random.default_rng(i)
        pos, *neg = (" ".join(random.choice(WORDS, 8)) for _ in range(3))
        return {"query": " ".join([*WORDS[3 * (i % TOPICS) :][:3], WORDS[-1 - i % 6]]), "pos": [pos], "neg": neg}

    (folder / "groups.jsonl").write_text("".join(json.dumps(group(i)) + "\n" for i in range(48)))
    return flags


def rows_of(output: Path) -> list[list[tuple[int, int]]]:
    return [[tuple(row) for row in step.rows] for step in steps(output)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """Return the output of the undisturbed run."""
    from process_runtime import use_processes

    output = tmp_path_factory.mktemp("whole") / "out"
    with use_processes():
        finetune(**flags, **SIMILAR, output_dir=str(output))
    return output


def test_queries_of_a_step_are_similar(flags, whole):
    """Their mean cosine is far above that of random steps, and each row is trained once."""
    lines = Path(flags["train_data"][0]).read_text().splitlines(True)
    offsets = np.cumsum([0, *map(len, lines[:-1])]).tolist()
    vectors = Encoder(flags["model_name_or_path"], devices="cpu").encode_queries(
        [json.loads(line)["query"] for line in lines]
    )
    number = {offset: i for i, offset in enumerate(offsets)}
    found = [[number[offset] for _, offset in step] for step in rows_of(whole)]
    assert sorted(row for step in found for row in step) == list(range(48))

    def similarity(steps: list) -> float:
        return float(np.mean([np.mean(vectors[step] @ vectors[step].T) for step in steps]))

    random = np.random.default_rng(0)
    others = [similarity(random.permutation(48).reshape(8, 6).tolist()) for _ in range(200)]
    assert similarity(found) > max(others)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_and_model_do_not_depend_on_the_workers(worker_processes, whole, flags, tmp_path, workers):
    model = make_tiny(tmp_path / "tiny", dropout=0.0)
    flags = flags | SIMILAR | {"model_name_or_path": model, "optim": "sgd"}
    outputs = tmp_path / "two", tmp_path / "other"
    finetune(**flags, output_dir=str(outputs[0]))
    finetune(**{**flags, "num_workers": str(workers)}, output_dir=str(outputs[1]))
    two, other = map(rows_of, outputs)
    assert [sorted(step) for step in two] == [sorted(step) for step in other]
    assert_same_model(outputs[1], outputs[0])


def test_a_repeated_and_a_continued_run_equal_an_undisturbed_one(worker_processes, flags, whole, tmp_path, monkeypatch):
    outputs = [tmp_path / name for name in ("again", "lost")]
    finetune(**flags, **SIMILAR, output_dir=str(outputs[0]))
    assert weights_of(outputs[0]) == weights_of(whole)

    with full_disk_after_step(5):
        finetune(**flags, **SIMILAR, output_dir=str(outputs[1]))
    assert latest_checkpoint(outputs[1]).step == 4
    # the clusters are those of the first start
    monkeypatch.setattr(similar_batches, "cluster_queries", None)
    with pytest.raises(UserError, match="the flags that choose and order the rows differ"):
        finetune(**flags, output_dir=str(outputs[1]), resume=True, log_rows=True)
    finetune(**flags, **SIMILAR, output_dir=str(outputs[1]), resume=True)
    assert_same_model(outputs[1], whole)
    assert rows_of(outputs[1]) == rows_of(whole)


def weights_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.fixture
def saved(flags, tmp_path) -> Path:
    """Write the queries' vectors as raybge.encode does; test_encode.py compares its metadata."""
    (path,) = flags["train_data"]
    model = flags["model_name_or_path"]
    queries = [json.loads(line)["query"] for line in Path(path).read_text().splitlines()]
    np.save(tmp_path / "queries.npy", Encoder(model, devices="cpu").encode_queries(queries))
    options = {"kind": "query", "text_field": "query", "precision": "float32", "model_name_or_path": model}
    write_meta(tmp_path / "queries.npy", {"options": options, "model": model_identity(model)})
    return tmp_path / "queries.npy"


def write_meta(path: Path, content: dict) -> None:
    Path(metadata_path(str(path))).write_text(json.dumps(content))


def test_saved_vectors_give_the_batches_of_the_model(worker_processes, flags, whole, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(similar_batches, "make_embedder", None, raising=False)
    finetune(**flags, **SIMILAR, batch_vectors=str(saved), output_dir=str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == rows_of(whole)


def test_saved_vectors_of_other_rows_are_named(worker_processes, flags, saved, tmp_path):
    np.save(saved, np.load(saved)[:40])
    with pytest.raises(UserError, match=r"holds 40 vectors, but .* 48 usable rows; encode the same files"):
        finetune(**flags, **SIMILAR, batch_vectors=str(saved), output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "holds vectors of another model"),
        ({"model": None}, "holds vectors of another model"),
        ({"options": {"kind": "passage"}}, "does not hold the queries in float32"),
        ({"options": {"text_field": "pos"}}, "does not hold the queries in float32"),
        ({"options": {"precision": "int8"}}, "does not hold the queries in float32"),
        ({"options": None}, "was not written by raybge.encode"),
    ],
    ids=str,
)
def test_wrong_vectors_are_named(flags, saved, change, message):
    content = json.loads(Path(metadata_path(str(saved))).read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    write_meta(saved, content)
    with pytest.raises(UserError, match=message):
        spec_of(flags, batch_vectors=str(saved))


def test_missing_vectors_are_named(flags, saved):
    for path in ("s3://bucket/x.npy", "x.parquet"):
        with pytest.raises(UserError, match=r"expected a \.npy file on a folder that all nodes share"):
            spec_of(flags, batch_vectors=path)
    Path(metadata_path(str(saved))).unlink()
    with pytest.raises(UserError, match=r"queries\.npy\.meta\.json cannot be read"):
        spec_of(flags, batch_vectors=str(saved))


def spec_of(flags, **more) -> SimilaritySpec | None:
    required = {"model_name_or_path": flags["model_name_or_path"], "train_data": ["d"], "output_dir": "o"}
    return SimilaritySpec.from_options(build_options(TrainOptions, required | {"batch_by": "similarity"} | more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_by": "random", "batch_clusters": 4}, "--batch_clusters requires --batch_by similarity"),
        ({"batch_by": "random", "batch_vectors": "x.npy"}, "--batch_vectors requires --batch_by similarity"),
        ({"use_inbatch_neg": False}, "it requires --use_inbatch_neg"),
        ({"dataset_weights": ["d=2"]}, "give one of it and --dataset_weights"),
        ({"batch_clusters": 1}, "--batch_clusters must be from 2 to 16,384, found 1"),
        ({"batch_clusters": 20_000}, "--batch_clusters must be from 2 to 16,384, found 20,000"),
    ],
    ids=str,
)
def test_wrong_flags_are_named(flags, more, message):
    with pytest.raises(UserError, match=message):
        spec_of(flags, **more)


def test_only_fine_tuning_has_it(flags):
    assert spec_of(flags, batch_by="random") is None
    options = build_options(PretrainOptions, {"train_data": ["d"], "output_dir": "o", "model_name_or_path": "m"})
    assert SimilaritySpec.from_options(options) is None


def test_the_number_of_clusters_follows_from_the_steps(flags):
    def clusters(rows: int, global_batch: int, **more: int) -> int:
        return spec_of(flags, **more).cluster_count(Order([rows], global_batch, 0))

    assert clusters(100, 10) == 2
    assert clusters(1_000_000, 64) == 1953
    assert clusters(10**8, 64) == 2048
    assert clusters(10**8, 65_536) == 190
    assert clusters(100, 10, batch_clusters=10) == 10
    with pytest.raises(UserError, match="--batch_clusters 11: the 100 groups make 10 steps of 10"):
        clusters(100, 10, batch_clusters=11)
    with pytest.raises(UserError, match="the 100 groups make a single step of 128"):
        clusters(100, 128)


def test_close_negatives_are_excluded_by_default(flags):
    def margin(**more) -> float | None:
        required = {"model_name_or_path": flags["model_name_or_path"], "train_data": ["d"], "output_dir": "o"}
        return ObjectiveSpec.from_options(build_options(TrainOptions, required | more)).margin

    assert (margin(), margin(batch_by="similarity")) == (None, 0.0)
    assert margin(batch_by="similarity", false_negative_margin=0.1) == 0.1
    assert margin(batch_by="similarity", false_negative_margin=-2.0) is None


def test_a_dry_run_prints_the_plan_and_encodes_nothing(worker_processes, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(similar_batches, "cluster_queries", None)
    finetune(**flags, **SIMILAR, output_dir=str(tmp_path / "out"), dry_run=True)
    assert (
        "batches: of similar queries, from 4 clusters by the model's vectors before training; false negatives: known "
        "positives are masked, and passages whose cosine is above the positive's minus 0 (--false_negative_margin)"
    ) in capsys.readouterr().out
