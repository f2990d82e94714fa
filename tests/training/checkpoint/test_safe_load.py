"""Checkpoints in shards: PyTorch unpickles their index and all that is no tensor, unless it is kept from it."""

import enum
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from raybge.training.checkpoint.safe_load import FORCED, plainly_loaded
from raybge.util.errors import UserError


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, place) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def shards(tmp_path) -> str:
    """Where a checkpoint has them."""
    (tmp_path / "checkpoint-4").mkdir()
    return str(tmp_path / "checkpoint-4/optimizer_0")


@pytest.fixture
def load(tmp_path, shards):
    """Into what is given, as accelerate does."""

    def into(state: dict) -> dict:
        with plainly_loaded(str(tmp_path / "checkpoint-4"), "state"):
            dcp.load(state, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
        return state

    return into


def save(state: dict, shards: str) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)


def trained() -> tuple[dict, dict]:
    """The state of a layer and its optimizer, behind a step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return layer.state_dict(), optimizer.state_dict()


def test_tensors_and_numbers_come_back(shards, load):
    layer, optimizer = trained()
    save({"layer": layer, "optimizer": optimizer, "more": {"betas": (0.9, 0.99), "none": None}}, shards)
    empty = {name: torch.zeros_like(value) for name, value in layer.items()}
    found = load({"layer": empty, "optimizer": trained()[1], "more": {"betas": (0.0, 0.0), "none": 1}})
    assert found["more"] == {"betas": (0.9, 0.99), "none": None}
    for name, value in layer.items():
        torch.testing.assert_close(found["layer"][name], value, atol=0, rtol=0)
    assert FORCED not in os.environ


def test_an_evil_value_is_refused(shards, load, tmp_path):
    save({"value": Evil(tmp_path / "harm")}, shards)
    with pytest.raises(
        UserError, match=r"the state in .*checkpoint-4 is refused: .*could run a program .*it asks for posix.mkdir\)$"
    ):
        load({"value": 1})
    assert not (tmp_path / "harm").exists()
    dcp.load({"value": 1}, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
    assert (tmp_path / "harm").exists()  # it would have


@pytest.mark.parametrize("evil", [Evil, lambda place: [len, {"a": Evil(place)}]])
def test_an_evil_index_is_refused(shards, load, tmp_path, evil):
    save({"value": 1}, shards)
    Path(shards, ".metadata").write_bytes(pickle.dumps(evil(tmp_path / "harm")))
    with pytest.raises(UserError, match=r"is refused: .*has no place in an index"):
        load({"value": 1})
    assert not (tmp_path / "harm").exists()


def test_an_index_cut_short_is_refused(shards, load):
    save({"value": 1}, shards)
    index = Path(shards, ".metadata")
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    with pytest.raises(UserError, match="is refused: a file there is damaged"):
        load({"value": 1})


def test_other_errors_are_left_as_they_are(shards, load):
    save({"value": torch.ones(2)}, shards)
    with pytest.raises(dcp.api.CheckpointException, match="missing"):
        load({"missing": torch.ones(2)})


def test_deepspeeds_own_values_are_taken_where_it_runs(tmp_path, monkeypatch):
    """It asks torch for a whole pickle."""

    class ZeroStageEnum(enum.IntEnum):
        gradients = 2

    name = "deepspeed.runtime.zero.config"
    for parent in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", name):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[name].ZeroStageEnum = ZeroStageEnum
    ZeroStageEnum.__module__, ZeroStageEnum.__qualname__ = name, "ZeroStageEnum"
    torch.save({"zero_stage": ZeroStageEnum.gradients, "step": torch.ones(1)}, tmp_path / "states.pt")
    with plainly_loaded(str(tmp_path), "state"):
        assert torch.load(tmp_path / "states.pt", weights_only=False)["zero_stage"] == 2
    torch.save({"zero_stage": Evil(tmp_path / "harm")}, tmp_path / "states.pt")
    with pytest.raises(UserError, match="the state in .* is refused"), plainly_loaded(str(tmp_path), "state"):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "harm").exists()
