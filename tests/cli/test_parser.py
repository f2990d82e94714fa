"""Flags: the command line, the file and the Python function understand the same names in the same way."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainingArguments

from raybge.cli.options import EvaluateOptions, MineOptions, TrainOptions
from raybge.cli.parser import build_options, declared_flags, parse_options
from raybge.cli.training_arguments import training_argument_flags
from raybge.util.errors import UserError

NEEDED = ["--model_name_or_path", "m", "--train_data", "a.jsonl", "--output_dir", "out"]


def train(*argv):
    return parse_options(TrainOptions, [*NEEDED, *argv], "train")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], True),
        (["--negatives_cross_device"], True),
        (["--negatives_cross_device", "True"], True),
        (["--negatives_cross_device", "False"], False),
        (["--negatives_cross_device=false"], False),
        (["--negatives_cross_device", "0"], False),
    ],
)
def test_booleans_take_three_forms(argv, value):
    assert train(*argv).negatives_cross_device is value


@pytest.mark.parametrize("name", ["normalize_embeddings", "normlized"])
def test_both_spellings(name):
    assert train(f"--{name}", "False").normalize_embeddings is False
    assert build_options(TrainOptions, {**required(), name: False}).normalize_embeddings is False


def required(**flags):
    return {"model_name_or_path": "m", "train_data": "a.jsonl", "output_dir": "out", **flags}


def test_paths_may_be_objects():
    built = build_options(TrainOptions, required(output_dir=Path("out"), train_data=Path("a.jsonl")))
    assert (built.training["output_dir"], built.train_data) == ("out", ["a.jsonl"])


def test_commands_of_flagembedding_parse():
    """The commands of FlagEmbedding's documents, without the launcher."""
    mine = """--model_name_or_path BAAI/bge-base-en-v1.5 --input_file toy.jsonl --output_file toy_minedHN.jsonl
        --range_for_sampling 2-200 --use_gpu_for_searching"""
    assert parse_options(MineOptions, mine.split(), "mine").use_gpu_for_searching is True
    tune = """--output_dir out --model_name_or_path BAAI/bge-large-zh-v1.5 --train_data toy.jsonl --learning_rate 1e-5
        --fp16 --num_train_epochs 5 --per_device_train_batch_size 1 --dataloader_drop_last True --normlized True
        --temperature 0.02 --query_max_len 64 --passage_max_len 256 --train_group_size 2 --negatives_cross_device
        --logging_steps 10 --query_instruction_for_retrieval"""
    parsed = parse_options(TrainOptions, [*tune.split(), ""], "train")
    assert parsed.query_instruction_for_retrieval == ""
    assert parsed.training["learning_rate"] == 1e-5
    assert parsed.training["dataloader_drop_last"] is True
    rate = "--encoder BAAI/bge-base-en-v1.5 --fp16 --add_instruction --k 100 --corpus_data c --query_data q"
    assert parse_options(EvaluateOptions, rate.split(), "evaluate").add_instruction is True


def test_every_training_argument_is_known():
    """The flags read from the source equal the class itself."""
    fields = {name: f for name, f in TrainingArguments.__dataclass_fields__.items() if f.init}
    assert set(training_argument_flags()) == set(fields)
    for name, f in training_argument_flags().items():
        if isinstance(fields[name].default, bool | int | float) and not f.many and name != "warmup_steps":
            assert f.default == fields[name].default, name
            assert f.kind == type(fields[name].default).__name__ or f.kind in ("float", "str"), name


def test_config_file_and_flags_over_it(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "train_data: [x.jsonl, y.jsonl]\nnormalize_embeddings: false\nlearning_rate: 1e-5\nnum_workers: 2\n"
    )
    parsed = parse_options(
        TrainOptions,
        ["--config", str(config), "--model_name_or_path", "m", "--output_dir", "o", "--normalize_embeddings", "True"],
        "train",
    )
    assert parsed.train_data == ["x.jsonl", "y.jsonl"]
    assert parsed.normalize_embeddings is True
    assert parsed.num_workers == "2"
    assert float(parsed.training["learning_rate"]) == 1e-5  # YAML 1.1 takes 1e-5 for a text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trian_data", "x"], "no flag --trian_data; did you mean --train_data?"),
        (["--temperature", "warm"], "temperature"),
        (["--use_inbatch_neg", "perhaps"], "True or False"),
        (["--pooling_method", "max"], "cls"),
        (["--push_to_hub"], "--push_to_hub cannot be used: workers have no hub login"),
        (["stray"], "stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    argv = [*argv] if argv[0] != "stray" else ["--seed", "1", "stray"]
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        train(*argv)


def test_missing_flags_are_all_named():
    with pytest.raises(UserError, match="--model_name_or_path, --train_data, --output_dir"):
        parse_options(TrainOptions, [], "train")


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": "hot"},
        {"train_group_size": True},
        {"nonsense": 1},
        {"mrl_dims": "wide"},
        {"train_group_size": 1.5},
    ],
)
def test_the_python_function_checks_alike(flags):
    with pytest.raises(UserError, match=next(iter(flags))):
        build_options(TrainOptions, required(**flags))


@pytest.mark.parametrize("command", ["mine", "train", "merge", "evaluate", "demo"])
def test_help_is_quick_and_imports_no_torch(command):
    """1.5 s on a quiet machine: the test counts imports, which do not depend on how busy this one is."""
    code = (
        f"import sys, raybge, raybge.{command} as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'ray', 'faiss', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m raybge." + command in done.stdout
    assert time.monotonic() - started < 15


def test_help_shows_own_flags_in_groups_and_all_on_request(capsys):
    with pytest.raises(SystemExit):
        parse_options(TrainOptions, ["--help"], "train")
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_options(TrainOptions, ["--help-all"], "train")
    long = capsys.readouterr().out
    assert "--temperature" in short and "--adam_beta1" not in short
    assert all(f"--{name}" in long for name in declared_flags(TrainOptions))
    assert short.index("required:") < short.index("--output_dir") < short.index("objective:")


@pytest.mark.parametrize(
    "text",
    ["learning_rate: .nan", "temperature: nan", "per_device_train_batch_size: [8]", "max_steps: 1.5", "bf16: [no]"],
)
def test_values_of_another_kind_are_refused_in_a_file(tmp_path, text):
    """TrainingArguments as well: nan would pass each range check, a list would end in a traceback."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=f"--{text.partition(':')[0]} takes "):
        train("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("word", ["nan", "-nan"])
def test_nan_is_refused_on_the_command_line(word):
    with pytest.raises(UserError, match="--temperature"):
        train(f"--temperature={word}")


@pytest.mark.parametrize(
    "text", ["seed: 2020-99-99", "seed: !!int x", "seed: !!timestamp x", "[" * 3000, "seed: 99999999999-01-01", "\xff"]
)
def test_a_file_that_is_not_yaml_is_named(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="--config .*run.yaml|--seed takes"):
        train("--config", str(tmp_path / "run.yaml"))


def test_json_that_is_nested_too_deep_is_refused():
    with pytest.raises(UserError, match="--lr_scheduler_kwargs: .* is not JSON"):
        train("--lr_scheduler_kwargs", '{"a":' * 100_000)
