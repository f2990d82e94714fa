"""Checks and plan of a training run before its workers start, and the checks of a worker before it trains."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_tiny

from raybge.cli.console import Console
from raybge.cli.options import TrainOptions
from raybge.cli.parser import build_options
from raybge.cluster.resources import Plan
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.training.checkpoint.final_model import RESULTS
from raybge.training.checkpoint.manifest import Checkpoint
from raybge.training.run import _check_output, _description, _markers, _survey
from raybge.training.spec import TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.worker import _check_shared_folders
from raybge.training.worker_config import PlannedRun, TrialContext
from raybge.util.errors import UserError
from raybge.util.filesystem import STATE_FOLDER


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def spec_of(model: str, output: Path, **flags) -> TrainingSpec:
    flags = {"model_name_or_path": model, "train_data": ["d"], "output_dir": str(output), **flags}
    return TrainingSpec.from_options(build_options(TrainOptions, flags), FinetuneSpec)


# --- output folder ----------------------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (("model.txt",), {}, "--output_dir .*/out is not empty; choose another, or add --overwrite"),
        ((f"{STATE_FOLDER}/x", RESULTS), {}, "--output_dir .* is not empty"),
        (("model.txt",), {"resume": True}, "--output_dir .* is not empty, and there is no run in it to continue"),
        ((), {"resume": True, "overwrite_output_dir": True}, "removes the run that --resume continues"),
    ],
)
def test_an_output_folder_with_other_files_is_refused(tiny, tmp_path, content, flags, message):
    output = fill(tmp_path / "out", *content)
    with pytest.raises(UserError, match=message):
        _check_output(spec_of(tiny, output, **flags))
    assert [(output / name).read_text() for name in content] == ["{}"] * len(content)


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ((), {}),
        ((f"{STATE_FOLDER}/x",), {}),  # of a run that ended before its first checkpoint
        (("model.txt",), {"overwrite_output_dir": True}),
        ((f"{STATE_FOLDER}/x", "checkpoint-3/raybge.json"), {"resume": True}),
    ],
)
def test_output_folders_that_a_run_may_use(tiny, tmp_path, content, flags):
    _check_output(spec_of(tiny, fill(tmp_path / "out", *content), **flags))


def test_an_output_folder_that_is_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}/out is a file"):
        _check_output(spec_of(tiny, tmp_path / "out"))


def test_a_model_inside_of_the_overwritten_folder_is_refused(tmp_path):
    """It would be deleted before it is read."""
    model = make_tiny(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(UserError, match=f"{model} is inside of the --output_dir that would be overwritten"):
        _check_output(spec_of(model, tmp_path / "out", overwrite_output_dir=True))


def test_checkpoints_of_another_run_in_the_storage_are_refused(tiny, tmp_path):
    fill(tmp_path / "storage", "checkpoint-3/raybge.json")
    flags = {"storage_path": str(tmp_path / "storage")}
    with pytest.raises(UserError, match=f"--storage_path {tmp_path}/storage holds checkpoints of another run"):
        _check_output(spec_of(tiny, tmp_path / "out", **flags))
    for more in ({"resume": True}, {"overwrite_output_dir": True}):
        _check_output(spec_of(tiny, tmp_path / "out", **flags, **more))


def test_rows_are_counted_and_decompressed_in_the_cache_path(tiny, tmp_path):
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"query": "what", "pos": ["lane"], "neg": ["row"]}\n' * 8))
    cache = tmp_path / "cache"
    spec = spec_of(tiny, tmp_path / "out", train_data=[str(data)], train_group_size=2, cache_path=str(cache))
    counts = _survey(spec, list_files(spec.data.train_data, "--train_data"), Console())
    assert counts.total_rows == 8 and Path(counts.files[0].path).parent == cache / "data"
    assert [path.name[:7] for path in cache.glob("survey-*.json")] == ["survey-"]
    assert spec_of(tiny, tmp_path / "out").run.cache == tmp_path / "out" / STATE_FOLDER
    with pytest.raises(UserError, match="--cache_path memory://c: give a folder that all nodes share, not a URI"):
        spec_of(tiny, tmp_path / "out", cache_path="memory://c")


# --- plan -------------------------------------------------------------------------------------------------------------


def plan_lines(model: str, folder: Path, gpus: int = 0, start: Checkpoint | None = None, **flags) -> list[str]:
    """Return the plan's lines for one group on one worker."""
    (folder / "groups.jsonl").write_text(json.dumps({"query": "a", "pos": ["b"], "neg": ["c"]}) + "\n")
    spec = spec_of(model, folder / "out", **flags)
    rows = survey(list_files(str(folder / "groups.jsonl"), "--train_data"), 100, spec.task.row_parser)
    data = spec.data.arrange(rows, spec.batch.global_batch(1, None), 1)
    return list(_description(PlannedRun(spec, data, Plan(1, 1, gpus), 1.0, start, TrialContext())))


def test_the_plan_states_that_fp16_is_off_without_a_gpu(tiny, tmp_path):
    line = "--fp16 is off: there is no GPU, and fp16 gains nothing on a CPU; --bf16 does on some"
    assert line in plan_lines(tiny, tmp_path, fp16=True)
    for lines in (plan_lines(tiny, tmp_path, gpus=1, fp16=True), plan_lines(tiny, tmp_path)):
        assert not [line for line in lines if "is off" in line]


def test_the_plan_states_where_a_run_continues(tiny, tmp_path):
    start = SimpleNamespace(path="s3://key:secret@bucket/checkpoint-1200", step=1200)
    line = "continues from s3://…@bucket/checkpoint-1200: 1,200 updates are done"
    assert plan_lines(tiny, tmp_path, start=start, resume=True)[-1] == line
    assert plan_lines(tiny, tmp_path, resume=True)[-1].startswith("nothing to continue: there is no complete")
    assert "continue" not in plan_lines(tiny, tmp_path)[-1]


# --- folders that nodes share -----------------------------------------------------------------------------------------


def test_a_worker_without_a_shared_folder_names_it(tiny, tmp_path):
    """As on a node that has a folder of the same name, but not the same folder."""
    run = spec_of(tiny, tmp_path / "out", storage_path=str(tmp_path / "storage")).run
    with _markers(run, "run-1") as markers:
        config = SimpleNamespace(markers=tuple(map(str, markers)))
        _check_shared_folders(config, rank=3)
        assert [marker.parent.parent for marker in markers] == [tmp_path / "out", tmp_path / "storage"]
        markers[1].unlink()
        with pytest.raises(UserError, match=f"worker 3 cannot see {tmp_path}/storage/{STATE_FOLDER}: on several nodes"):
            _check_shared_folders(config, rank=3)
    with pytest.raises(UserError, match=f"worker 0 cannot see {tmp_path}/out/"):  # the driver has ended
        _check_shared_folders(config, rank=0)


@pytest.mark.parametrize(
    ("negatives", "size", "line"),
    [
        ([3, 3], 4, None),
        ([3, 9], 1, None),
        ([3, 2, 1, 0], 4, "of 4 groups 2 have fewer, which are repeated and 1 have none; raybge.mine finds more"),
        ([0], 2, "of 1 group 1 have none"),
        ([1] * 3000, 3, "groups in a sample"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_plan_names_groups_with_few_negatives(tiny, tmp_path, negatives, size, line):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": [f"n{j}" for j in range(n)]} for i, n in enumerate(negatives)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_of(tiny, tmp_path / "out", train_group_size=size)
    counts = survey(list_files(str(tmp_path / "g.jsonl"), "--train_data"), 500, spec.task.row_parser)
    notes = spec.task.row_notes(counts)
    assert len(notes) == (line is not None) and all(line in note for note in notes)
