"""The Python functions as functions: signatures, types, and errors that name their arguments."""

import dataclasses
import inspect
import pydoc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import raybge
from raybge.cli import keyword_source
from raybge.cli.options import EvaluateOptions, TrainOptions
from raybge.cli.parser import declared_flags
from raybge.cli.signatures import in_terms_of_arguments

ROOT = Path(__file__).parents[2]
TRAINED = {"model_name_or_path": "m", "train_data": "d.jsonl", "output_dir": "out"}
SEARCHED = {"model_name_or_path": "m", "input_file": "a.jsonl", "output_file": "b.jsonl"}
MERGED = {"model_names_or_paths": ["a", "b"], "model_type": "encoder"}
# Arguments that a call of each function needs, and one whose value has the wrong type.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "finetune": (TRAINED, {"learning_rate": "high"}),
    "pretrain_retromae": (TRAINED, {"max_seq_length": 1.5}),
    "tune_finetune": (TRAINED, {"num_samples": "many"}),
    "mine_hard_negatives": (SEARCHED, {"negative_number": [3]}),
    "evaluate_retrieval": ({"model_name_or_path": "m"}, {"add_instruction": 2}),
    "encode_dataset": (SEARCHED, {"precision": "int4"}),
    "mix_models": ({**MERGED, "weights": [0.5, 0.5]}, {"ties_density": "thin"}),
    "mix_models_with_data": ({**MERGED, "example_data": "d.jsonl"}, {"merge_method": "sum"}),
}
functions = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("file", keyword_source.FILES)
def test_generated_types_are_up_to_date(file):
    """After a change of a flag: `make signatures`."""
    written = (keyword_source.FOLDER / file).read_text(encoding="utf-8")
    assert written == keyword_source.source(keyword_source.FILES[file])


# --- type checkers ----------------------------------------------------------------------------------------------------

# Only the functions and the types of their arguments are read: the whole package takes mypy a minute.
MYPY = """
[mypy]
follow_imports = skip
[mypy-raybge,raybge.train,raybge.tune,raybge.pretrain,raybge.mine,raybge.evaluate,raybge.encode,raybge.merge]
follow_imports = normal
[mypy-raybge.cli.options.*,raybge.cli.signatures,raybge.merging.lm_cocktail]
follow_imports = normal
"""


def call(name: str, **values: Any) -> str:
    return f"raybge.{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def test_mypy_checks_the_calls(tmp_path):
    """Right calls pass; a wrong type, a wrong keyword and a missing argument of each function are errors."""
    right, wrong = ["from pathlib import Path", "import raybge"], ["import raybge"]
    for name, (needed, odd) in CALLS.items():
        right += [call(name, **needed), call(name, **needed, num_workers=2, cpus_per_worker=None, verbose=True)]
        wrong += [call(name, **needed, **odd), call(name, **needed, nonsense=1)]
        wrong.append(call(name, **dict(list(needed.items())[:-1])))
    right += [
        call("finetune", **TRAINED, learning_rate=2e-5, num_train_epochs=2, mrl_dims=[64, 128], bf16=True),
        "raybge.finetune(model_name_or_path=Path('m'), train_data=[Path('a'), 'b'], output_dir=Path('o'))",
        "raybge.mix_models(['a', 'b'], 'encoder', [0.5, 0.5], 'out', return_model=False, merge_method='slerp')",
    ]
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "right.py").write_text("\n".join(right) + "\n")
    (tmp_path / "wrong.py").write_text("\n".join(wrong) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-pretty", "right.py", "wrong.py"]
    environment = {"PATH": "", "MYPYPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    errors = {line.split(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line}
    assert errors == {f"wrong.py:{number}" for number in range(2, len(wrong) + 1)}, done.stdout + done.stderr


# --- help -------------------------------------------------------------------------------------------------------------


@functions
def test_help_lists_arguments_with_types_and_defaults(name):
    page = pydoc.plain(pydoc.render_doc(getattr(raybge, name)))
    assert "num_workers: str | pathlib.Path | int | None = None" in page and "verbose: bool = False" in page
    assert "\n        verbose: show the messages of Ray and transformers (default: False)\n" in page
    assert "max_failures" not in page or "tune" in name or "train" in name or name == "finetune"  # refused elsewhere


def test_defaults_are_those_of_the_commands():
    parameters = inspect.signature(raybge.finetune).parameters
    own = {each.name: each.default for each in dataclasses.fields(TrainOptions) if each.name in parameters}
    own = {name: value for name, value in own.items() if value is not dataclasses.MISSING}
    fields = {name: each.default for name, each in TrainingArguments.__dataclass_fields__.items()}
    assert len(own) > 60 and {name: parameters[name].default for name in own} == own
    for name in ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "bf16", "save_steps"):
        assert parameters[name].default == fields[name]
    assert parameters["output_dir"].default is inspect.Parameter.empty
    assert parameters["mrl_dims"].annotation == int | Sequence[int] | None


def test_signatures_need_no_torch():
    code = (
        "import sys, inspect, raybge\n"
        "assert 'learning_rate' in inspect.signature(raybge.finetune).parameters\n"
        "assert raybge.UserError and raybge.MiningResult and 'UserError' in dir(raybge)\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# --- errors -----------------------------------------------------------------------------------------------------------


@functions
def test_errors_name_the_argument(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed, odd = CALLS[name]
    ((argument, value),) = odd.items()
    for values, text in [
        ({**needed, **odd}, f"{argument} takes "),
        ({**needed, f"{argument}s": value}, f"there is no argument {argument}s; did you mean {argument}?"),
    ]:
        with pytest.raises(raybge.UserError) as caught:
            getattr(raybge, name)(**values)
        assert str(caught.value).startswith(text) and isinstance(caught.value, ValueError)


def test_missing_arguments_and_files_are_named(tmp_path, tiny_model):
    with pytest.raises(raybge.UserError, match="^missing: train_data, output_dir$"):
        raybge.finetune(model_name_or_path="m")
    with pytest.raises(raybge.UserError, match="^train_data: .*nowhere.jsonl"):
        raybge.finetune(**TRAINED | {"train_data": tmp_path / "nowhere.jsonl", "model_name_or_path": tiny_model})


def test_a_file_of_flags_is_read(tmp_path):
    (tmp_path / "run.yaml").write_text("temperature: cold\n")
    with pytest.raises(raybge.UserError, match="^temperature takes a number"):
        raybge.finetune(**TRAINED, config=tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--k 3 is below --index_factory's", "k 3 is below index_factory's"),
        ("add --on_bad_rows skip, --fp16 False or --save_path x", 'add on_bad_rows="skip", fp16=False or save_path x'),
        ("the folder a--b and 1 --2", "the folder a--b and 1 --2"),
    ],
)
def test_flags_become_arguments(message, expected):
    assert in_terms_of_arguments(message, declared_flags(EvaluateOptions).values()) == expected
