"""Credentials are redacted: on the console, in logs, in a run's files and in Ray's own lists."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import hypothesis
import hypothesis.strategies as st
import pyarrow.fs as pafs
import pytest

from raybge.cli.options import EncodeOptions, MineOptions, TrainOptions, TuneOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.cli.run import run_command
from raybge.data.datasets import build_data_sets
from raybge.data.groups import parse_group
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.model.origin import ModelOrigin
from raybge.model.training_card import TrainingCard
from raybge.report.run_details import RunDetails
from raybge.search.metadata import write_metadata
from raybge.training import page
from raybge.tuning import run as tune
from raybge.tuning.command_lines import reproduction_commands
from raybge.tuning.spec import SearchAlgorithmSpec, search_command, search_settings, training_flags
from raybge.tuning.trial_spec import TrialSpec
from raybge.util.errors import UserError
from raybge.util.redaction import SECRET_FLAG, redact, redact_settings

CANARY = "c4n4ry"
URI = f"s3://AKIA{CANARY}:{CANARY}%2Fkey@bucket/groups.jsonl?region=eu&sas_token={CANARY}"
AZURE = f"abfs://:{CANARY}@account/groups.jsonl?account_key={CANARY}"


@hypothesis.given(
    key=st.text(min_size=1, max_size=8),
    secret=st.text(min_size=1, max_size=8).map(lambda text: f"{text}{CANARY}"),
    around=st.sampled_from(["{}", "--train_data: {} is not there", "OSError('{}')\n{} and {}"]),
)
def test_credentials_in_uris_are_redacted(key, secret, around):
    login = f"{quote(key, safe='')}:{quote(secret, safe='')}@"
    uri = f"s3://{login}bucket/a/b.jsonl?region=x"
    text = redact(around.replace("{}", uri))
    assert CANARY not in text and text.count("bucket/a/b.jsonl?region=x") == around.count("{}")


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@b.jsonl", "data/a@b.jsonl", "file:///a@b", "a: b@c", "s3://bucket/x?region=eu", "https://h:80/a"],
)
def test_other_text_stays(text):
    assert redact(text) == text


def test_an_unescaped_key_is_redacted():
    assert CANARY not in redact(f"cannot parse s3://AKIA:abc/{CANARY}/def@bucket/x")


# --- console and log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_neither_console_nor_log_has_credentials(error, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def command(options, console):
        console.info(f"reads {options.input_file}")
        raise error(f"{options.input_file} cannot be read")

    argv = ["--model_name_or_path", "m", "--input_file", URI, "--output_file", "o.jsonl"]
    assert run_command(MineOptions, command, "mine", argv) == (2 if error is UserError else 1)
    output = "".join(capfd.readouterr())
    log = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert output.count("bucket/groups.jsonl") == 2 and CANARY not in output + log
    assert error is UserError or "bucket/groups.jsonl" in log


def test_an_error_in_a_program_has_no_credentials():
    assert CANARY not in repr(UserError(f"--train_data: {URI} is not there"))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The bucket of URI is a folder of this machine."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "groups.jsonl").write_text('{"query": "q", "pos": "p"}\n' * 3 + "no JSON\n")

    def from_fsspec(uri):
        _, _, path = uri.partition("?")[0].partition("://")
        return pafs.LocalFileSystem(), str(tmp_path / path.rpartition("@")[2])

    monkeypatch.setattr("raybge.util.filesystem._from_fsspec", from_fsspec)
    return tmp_path / "bucket"


def test_a_file_is_named_without_credentials_and_opened_with_them(bucket):
    (file,) = list_files(URI, "--f")
    assert file.path == URI and file.name == redact(URI) and CANARY not in file.name
    (inside,) = list_files(URI.replace("/groups.jsonl", ""), "--f")
    assert CANARY in inside.path and CANARY not in inside.name + inside.folder


def test_a_survey_names_rows_without_credentials(bucket, tmp_path):
    files = list_files(URI, "--f")
    with pytest.raises(UserError) as error:
        survey(files, 100, parse_group)
    assert "groups.jsonl?region=eu" in str(error.value) and CANARY not in str(error.value)
    result = survey(files, 100, parse_group, "skip", str(tmp_path / "cache"))
    assert [*result.rows_by_file()] == [redact(URI)]
    assert CANARY not in "".join(path.read_text() for path in (tmp_path / "cache").iterdir())
    weighted = build_data_sets(result, 100, weights={URI: 3.0})  # the flag as the user wrote it
    assert weighted.mixture.total_F.tolist() == [9] and CANARY not in repr(weighted)


def text_flags(options_class) -> dict:
    """Return each text flag with a URI that contains credentials; secret flags with a secret."""
    values = {}
    for name, f in declared_flags(options_class).items():
        if f.kind == "str" and not f.choices and not f.transformers and not f.refused:
            values[name] = CANARY if SECRET_FLAG.search(name) else [URI, AZURE] if f.many else URI
    return values


@pytest.mark.parametrize("arguments", [MineOptions, EncodeOptions])
def test_the_metadata_of_an_output_has_no_credentials(arguments, tmp_path):
    """OUTPUT.meta.json, with its options."""
    options = build_options(arguments, {**text_flags(arguments), "output_file": str(tmp_path / "out")})
    write_metadata(str(tmp_path / "out"), asdict(options), {"counts": {"rows": 1}})
    written = (tmp_path / "out.meta.json").read_text()
    assert json.loads(written)["options"]["input_file"] != [] and "bucket" in written and CANARY not in written


def test_cards_and_reports_have_no_secrets():
    given = {**text_flags(TrainOptions), "fsdp_config": {"a": {"hub_token": CANARY, "place": URI}}}
    run = RunDetails("train", given, URI, [(URI, 3)], {"place": AZURE})
    said = page.html(page.TrainingReport(run))
    base = ModelOrigin.of(f"s3://k:{CANARY}@bucket")
    card = TrainingCard(base, [(f"s3://k:{CANARY}@bucket", 3)], given, hyperparameters=given).text()
    assert CANARY not in said and "bucket/groups.jsonl" in said
    assert CANARY not in card and "groups.jsonl" in card


def test_a_search_of_training_flags_stores_no_secrets(tmp_path):
    given = {**text_flags(TuneOptions), "output_dir": str(tmp_path / "out"), "search": ["learning_rate=uniform(0,1)"]}
    arguments = build_options(TuneOptions, {name: value for name, value in given.items() if name != "mine_config"})
    flags = training_flags(arguments)
    assert flags["token"] == CANARY and URI in flags["train_data"]  # a trial needs both
    tune.prepare_output(tmp_path / "out", False, tune.search_identity({}, search_settings(arguments), flags))
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "bucket/groups.jsonl" in written and CANARY not in written
    trial_spec = TrialSpec(flags, "f", 1, "s", {"corpus_data": [URI]})
    words = sum(reproduction_commands(trial_spec, [(0, {})]), search_command(arguments))
    assert "bucket/groups.jsonl" in " ".join(words) and CANARY not in " ".join(words)


def test_nested_settings_are_redacted():
    settings = {"token": CANARY, "a": [{"hub_token": CANARY, "at": URI}, (AZURE, 3, None)], "tokens": 5}
    redacted = redact_settings(settings)
    assert CANARY not in repr(redacted) and redacted["tokens"] == 5 and redacted["a"][1][1:] == [3, None]


# --- processes and Ray ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--token", CANARY], [f"--token={CANARY}"]], ids=["two words", "one word"])
def test_other_processes_do_not_see_the_token(words):
    """`ps` and Ray's list of jobs show command lines. The process id stays the same."""
    script = (
        "import json, os, sys; from raybge.util.redaction import command_line; words = command_line()\n"
        "print(json.dumps([os.getpid(), words, open('/proc/self/cmdline').read(), dict(os.environ)]))"
    )
    argv = [sys.executable, "-c", script, "--seed", "3", *words, "--dry_run"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        pid, argv_after, command_line, environment = json.loads(process.communicate()[0])
    assert pid == process.pid
    assert argv_after == ["--seed", "3", "--dry_run", *words]  # the same flags in another order
    assert CANARY not in command_line and CANARY not in repr(environment)


def test_ray_trains_view_of_a_run_has_no_token():
    from ray.train.v2._internal.state.schema import _to_json_serializable_value

    from raybge.training.worker_config import WorkerConfig

    nothing = dict.fromkeys(field.name for field in fields(WorkerConfig))
    config = WorkerConfig(**{**nothing, "task": SimpleNamespace(encoder={"token": CANARY}), "card": {"at": URI}})
    assert CANARY not in repr(_to_json_serializable_value({"worker": config}))


def test_ray_tune_does_not_put_keys_where_ray_logs_them(tmp_path, monkeypatch):
    """Trials see the environment of their node, as every other process that Ray starts there."""
    from ray import tune as ray_tune
    from ray.tune.execution.class_cache import _ActorClassCache

    from raybge.tuning.ray_tune import RayTuneSearch

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setattr(ray_tune, "with_parameters", lambda trainable, **_: trainable)
    found = []

    class Tuner:
        can_restore = staticmethod(lambda place: False)

        def __init__(self, *_, **__):
            pass

        def fit(self):
            found.append(_ActorClassCache().get(dict)._default_options["runtime_env"])

    monkeypatch.setattr(ray_tune, "Tuner", Tuner)
    given = {"model_name_or_path": "m", "train_data": "d", "output_dir": str(tmp_path)}
    task = SimpleNamespace(pauses=False, runs=1)
    spec = SearchAlgorithmSpec.from_options(build_options(TuneOptions, given), {})
    RayTuneSearch(spec, task, Path(tmp_path), print).run()
    assert found[0]["env_vars"] and CANARY not in repr(found)


@pytest.mark.alone  # starts a Ray of its own
def test_a_training_run_writes_no_secret(tmp_path, tiny_model):
    """Every file of a run with a token, keys in the environment and checkpoints, including the logs of Ray."""
    rows = [{"query": f"ak {i}", "pos": [f"al {i}"], "neg": ["am"]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tmp").mkdir()
    secret = {"HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "AZURE_STORAGE_KEY": CANARY}
    environment = {**os.environ, **secret, "TMPDIR": str(tmp_path / "tmp")}
    asked = f"--model_name_or_path {tiny_model} --train_data {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --token "
    asked += f"{CANARY} --per_device_train_batch_size 2 --num_train_epochs 1 --save_steps 1 --num_workers 1"
    command = [sys.executable, "-m", "raybge.train", *asked.split()]
    # of few letters: the names of Ray's sockets may have 107
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_folder:
        environment["RAY_TMPDIR"] = ray_folder
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        tops = tmp_path, Path(ray_folder)
        found = {path: path.read_bytes() for top in tops for path in top.rglob("*") if path.is_file()}
    assert done.returncode == 0, done.stderr
    names = {path.name for path in found}
    assert {"README.md", "report.html", "trainer_state.json", "optimizer.pt", "raylet.out", "gcs_server.out"} <= names
    assert [path for path, content in found.items() if CANARY.encode() in content] == []
    assert CANARY not in done.stdout + done.stderr
