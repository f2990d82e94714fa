"""Help: examples and common flags on the first screen, described commands, names of other programs, completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raybge.cli.completion import OPTIONS
from raybge.cli.help_page import WIDTH
from raybge.cli.options import EvaluateOptions, MineOptions, PretrainOptions, TrainOptions
from raybge.cli.parser import build_options, declared_flags, parse_options
from raybge.cli.run import COMMANDS, examples_of, main
from raybge.cli.suggestions import OTHER_NAMES
from raybge.util.errors import UserError

SCREEN = 45  # lines


def help_of(options_class: type, name: str, capsys: pytest.CaptureFixture) -> list[str]:
    with pytest.raises(SystemExit):
        parse_options(options_class, ["--help"], name, examples=examples_of(name))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("options_class", "name"), [(TrainOptions, "train"), (PretrainOptions, "pretrain")])
def test_the_first_screen_has_examples_and_common_flags(options_class, name, capsys):
    """Each common flag takes one line, and is not repeated below."""
    page = help_of(options_class, name, capsys)
    common = options_class.common_flags
    assert len(common) >= 20 and page[4].startswith(f"    python -m raybge.{name} --model_name_or_path")
    flags = declared_flags(options_class)
    for is_required in (True, False):
        names = [flag for flag in common if flags[flag].required is is_required]
        places = [next(i for i, line in enumerate(page) if line.startswith(f"  --{flag} ")) for flag in names]
        assert places[-1] < SCREEN and places == list(range(places[0], places[0] + len(names)))
    assert all(sum(line.startswith(f"  --{flag} ") for line in page) == 1 for flag in common)
    assert max(map(len, page)) <= WIDTH + 10  # examples may be longer


def test_the_25_flags_of_training_are_there(capsys):
    page = "\n".join(help_of(TrainOptions, "train", capsys)[:SCREEN])
    for flag in ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "bf16", "save_steps"):
        assert f"  --{flag} " in page
    assert page.count("\n  --") >= 25


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "runs"])
def test_examples_use_flags_of_the_command(name):
    words = examples_of(name).replace("\\\n", " ").splitlines()
    assert words
    for line in words:
        command = line.split("raybge.")[1].split()[0]
        flags = {spelling for f in declared_flags(OPTIONS[command]).values() for spelling in f.spellings}
        assert {word[2:] for word in line.split() if word.startswith("--")} <= flags


@pytest.mark.parametrize(
    ("options_class", "name", "flag"),
    [
        (TrainOptions, "lr", "learning_rate"),
        (TrainOptions, "epochs", "num_train_epochs"),
        (TrainOptions, "batch_size", "per_device_train_batch_size"),
        (TrainOptions, "model", "model_name_or_path"),
        (MineOptions, "data", "input_file"),
        (EvaluateOptions, "bs", "batch_size"),
        (EvaluateOptions, "lr", None),  # this command has no such thing
    ],
)
def test_names_of_other_programs_lead_to_the_flag(options_class, name, flag):
    with pytest.raises(UserError, match=rf"--{name}; (did you mean --{flag}\?|--help lists them)") as error:
        build_options(options_class, {name: "1"})
    assert (f"did you mean --{flag}" in str(error.value)) == (flag is not None)


def test_names_of_other_programs_are_no_flags():
    known = {flag for options_class in OPTIONS.values() for flag in declared_flags(options_class)}
    for name, targets in OTHER_NAMES.items():
        assert set(targets) <= known, name


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["raybge", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_commands_are_described_and_helped(monkeypatch, capsys):
    assert run_main(monkeypatch) == run_main(monkeypatch, "help") == run_main(monkeypatch, "--help") == 0
    page = capsys.readouterr().out
    assert page.count("usage: ") == 3
    for name in COMMANDS:
        assert f"\n  {name:<10}" in page
    assert run_main(monkeypatch, "help", "train") == 0
    first = capsys.readouterr().out
    assert run_main(monkeypatch, "train", "--help") == 0
    assert first == capsys.readouterr().out and "--learning_rate" in first


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("trian", "did you mean train?"), ("Evaluate", "did you mean evaluate?"), ("serve", "commands: mine, ")],
)
def test_misspelled_commands(monkeypatch, capsys, word, remedy):
    assert run_main(monkeypatch, word) == 2
    assert f"«{word}» is not a command; {remedy}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raybge tr", {"train "}),
        ("raybge m", {"mine", "merge"}),
        ("raybge train --learning_r", {"--learning_rate "}),
        ("raybge mine --on_bad_rows s", {"stop", "skip"}),
    ],
)
def test_completion(tmp_path: Path, line: str, expected: set[str]) -> None:
    pytest.importorskip("argcomplete", reason="an optional package (extra `completion`)")
    output = tmp_path / "completions"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "raybge"], env={**os.environ, **environment}, check=True)
    assert set(output.read_text().split("\n")) == expected
