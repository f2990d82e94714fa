"""A library whose version is not tested, or that lacks a private name: fall back, or one clear message."""

import re
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import transformers

from raybge.cli import run
from raybge.cli.options import TrainOptions
from raybge.compat import library_versions as versions
from raybge.compat import ray as compat_ray
from raybge.compat import transformers as compat_transformers
from raybge.train import main

FLAGS = ["--train_data", "missing.jsonl", "--model_name_or_path", "m", "--output_dir", "o"]


def test_the_installed_versions_are_tested_and_others_are_named(monkeypatch):
    assert versions.untested_versions() == []
    monkeypatch.setattr(versions, "_installed", lambda name: {"torch": "3.1.0"}.get(name, version(name)))
    (line,) = versions.untested_versions()
    assert re.fullmatch(r"torch 3\.1\.0 is not tested with raybge: pip install 'torch[=<>].*'", line)


def test_untested_versions_are_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(
        run, "untested_versions", lambda: ["ray 9.9 is not tested with raybge: pip install 'ray==2.60.*'"]
    )
    for _ in range(2):
        assert main(["--train_data", "missing.jsonl", "--model_name_or_path", "m", "--output_dir", "o"]) == 2
    assert capsys.readouterr().err.count("ray 9.9 is not tested") == 1


def test_a_command_names_the_library_that_lacks_a_name(monkeypatch, capsys, tmp_path):
    """An error of this kind is one message, not a traceback."""

    def fail(options, console):
        versions.require(transformers.Trainer, "_gone", "transformers")

    monkeypatch.chdir(tmp_path)
    assert (
        run.run_command(
            TrainOptions, fail, "train", ["--train_data", "t", "--model_name_or_path", "m", "--output_dir", "o"]
        )
        == 2
    )
    message = capsys.readouterr().err
    installed = re.escape(transformers.__version__)
    assert re.search(
        rf"transformers {installed} has no Trainer._gone, which raybge uses: install transformers[=<>]", message
    )
    assert "Traceback" not in message


def hide(monkeypatch, module: str) -> None:
    """Make the import of a module fail."""
    monkeypatch.setitem(sys.modules, module, None)


def test_without_private_names_ray_works_as_it_comes(monkeypatch):
    from ray.train.torch import TorchTrainer

    hide(monkeypatch, "ray.train.v2._internal.callbacks.datasets")
    assert compat_ray.torch_trainer_without_helpers() is TorchTrainer
    hide(monkeypatch, "ray.autoscaler.v2.utils")
    hide(monkeypatch, "ray.autoscaler.v2.sdk")
    assert compat_ray.is_autoscaling() is False and compat_ray.machines_are_starting() is False


def test_without_names_that_keep_secrets_or_close_ports_ray_is_refused(monkeypatch):
    from ray.tune.execution import class_cache

    monkeypatch.delattr(class_cache, "ENV_VARS_TO_PROPAGATE")
    with pytest.raises(versions.UnsupportedVersionError, match="ENV_VARS"), compat_ray.keys_out_of_trials():
        pass
    monkeypatch.delattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER")
    with pytest.raises(versions.UnsupportedVersionError, match="ENABLE_RAY"), compat_ray.ports_on_loopback():
        pass
    hide(monkeypatch, "ray._private.ray_constants")
    with pytest.raises(versions.UnsupportedVersionError, match="ray .* has no module"), compat_ray.ports_on_loopback():
        pass


def test_a_library_without_package_metadata_is_accepted(monkeypatch):
    monkeypatch.setattr(versions, "LIBRARIES", ("raybge_no_such_library",))
    assert versions.untested_versions() == []


def test_without_private_names_of_transformers_values_are_those_of_public_ones(monkeypatch):
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.25])
    assert compat_transformers.learning_rate(SimpleNamespace(lr_scheduler=scheduler)) == 0.25
    assert compat_transformers.attention_implementation(SimpleNamespace(config=SimpleNamespace())) is None
