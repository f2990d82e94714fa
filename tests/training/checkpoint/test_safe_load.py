"""Sharded checkpoints: without protection PyTorch unpickles their index and all values that are no tensors."""

import enum
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from raybge.training.checkpoint.safe_load import FORCE_VARIABLE, safe_loading
from raybge.util.errors import UserError


class Malicious:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def shards(tmp_path) -> str:
    """Return the folder of the shards in a checkpoint."""
    (tmp_path / "checkpoint-4").mkdir()
    return str(tmp_path / "checkpoint-4/optimizer_0")


@pytest.fixture
def load(tmp_path, shards):
    """Return a function that loads into a state, as accelerate does."""

    def load_into(state: dict) -> dict:
        with safe_loading(str(tmp_path / "checkpoint-4"), "state"):
            dcp.load(state, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
        return state

    return load_into


def save(state: dict, shards: str) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)


def trained_state() -> tuple[dict, dict]:
    """Return the state of a layer and its optimizer after a step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return layer.state_dict(), optimizer.state_dict()


def test_tensors_and_numbers_are_loaded(shards, load):
    layer, optimizer = trained_state()
    save({"layer": layer, "optimizer": optimizer, "more": {"betas": (0.9, 0.99), "none": None}}, shards)
    empty = {name: torch.zeros_like(value) for name, value in layer.items()}
    state = load({"layer": empty, "optimizer": trained_state()[1], "more": {"betas": (0.0, 0.0), "none": 1}})
    assert state["more"] == {"betas": (0.9, 0.99), "none": None}
    for name, value in layer.items():
        torch.testing.assert_close(state["layer"][name], value, atol=0, rtol=0)
    assert FORCE_VARIABLE not in os.environ


def test_malicious_value_is_refused(shards, load, tmp_path):
    save({"value": Malicious(tmp_path / "created")}, shards)
    with pytest.raises(
        UserError, match=r"the state in .*checkpoint-4 is refused: .*could run a program .*it refers to posix.mkdir\)$"
    ):
        load({"value": 1})
    assert not (tmp_path / "created").exists()
    dcp.load({"value": 1}, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
    assert (tmp_path / "created").exists()  # without protection


@pytest.mark.parametrize("make", [Malicious, lambda folder: [len, {"a": Malicious(folder)}]])
def test_malicious_index_is_refused(shards, load, tmp_path, make):
    save({"value": 1}, shards)
    Path(shards, ".metadata").write_bytes(pickle.dumps(make(tmp_path / "created")))
    with pytest.raises(UserError, match=r"is refused: .*is not allowed in an index"):
        load({"value": 1})
    assert not (tmp_path / "created").exists()


def test_truncated_index_is_refused(shards, load):
    save({"value": 1}, shards)
    index = Path(shards, ".metadata")
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    with pytest.raises(UserError, match="is refused: a file there is damaged"):
        load({"value": 1})


def test_other_errors_are_unchanged(shards, load):
    save({"value": torch.ones(2)}, shards)
    with pytest.raises(dcp.api.CheckpointException, match="missing"):
        load({"missing": torch.ones(2)})


def test_deepspeed_classes_are_allowed_if_it_is_loaded(tmp_path, monkeypatch):
    """DeepSpeed requests complete pickles from torch."""

    class ZeroStageEnum(enum.IntEnum):
        gradients = 2

    name = "deepspeed.runtime.zero.config"
    for parent in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", name):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[name].ZeroStageEnum = ZeroStageEnum
    ZeroStageEnum.__module__, ZeroStageEnum.__qualname__ = name, "ZeroStageEnum"
    torch.save({"zero_stage": ZeroStageEnum.gradients, "step": torch.ones(1)}, tmp_path / "states.pt")
    with safe_loading(str(tmp_path), "state"):
        assert torch.load(tmp_path / "states.pt", weights_only=False)["zero_stage"] == 2
    torch.save({"zero_stage": Malicious(tmp_path / "created")}, tmp_path / "states.pt")
    with pytest.raises(UserError, match="the state in .* is refused"), safe_loading(str(tmp_path), "state"):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "created").exists()
