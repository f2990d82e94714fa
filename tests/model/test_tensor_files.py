"""Tensors in files: written for safetensors, and read without running code or copying."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raybge.model import tensor_files as weights
from raybge.model.tensor_files import TensorSpec, mapped_tensors, shards_of, write_tensors
from raybge.util.errors import UserError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, with shapes that would misalign the next tensor without sorting."""
    torch.manual_seed(0)
    result = {f"b.{str(dtype)[6:]}": (100 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    return {
        "a.bool": torch.tensor([True, False, True]),
        "a.uint8": torch.arange(7, dtype=torch.uint8),
        "a.int8": torch.arange(5, dtype=torch.int8) - 2,
        **result,
        "c.single": torch.tensor(-0.0),
        "c.none": torch.zeros(0, 4),
    }


def written(folder: Path, tensors: dict[str, torch.Tensor], pieces: int = 3) -> list[str]:
    """Write the tensors in pieces; return the names in the order of completion."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    done: list[str] = []
    requested: list[str] = []

    def data(name):
        requested.append(name)
        return tensors[name].reshape(-1).split(pieces)

    write_tensors(folder, specs, data, lambda: done.append(requested[-1]))
    assert done == requested
    return done


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype and result[name].shape == tensor.shape, name
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (result[name], tensor))), name


def test_safetensors_reads_the_written_tensors(tensors, tmp_path):
    assert sorted(written(tmp_path, tensors)) == sorted(tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_tensors_are_aligned_for_their_dtype(tensors, tmp_path):
    """Memory-mapping would copy unaligned tensors."""
    written(tmp_path, tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_large_models_are_sharded(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 150)
    written(tmp_path, tensors)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    result: dict[str, torch.Tensor] = {}
    for name in files:
        part = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in part.values()) <= 150
        assert {index["weight_map"][key] for key in part} == {name}
        result |= part
    assert_same(result, tensors)
    assert_same(mapped_tensors(tmp_path), tensors)


def test_tensor_above_the_limit_has_its_own_file():
    specs = [TensorSpec(name, torch.uint8, (size,)) for name, size in zip("abcd", (9, 3, 2, 2), strict=True)]
    assert [[spec.name for spec in shard] for shard in shards_of(specs, 4)] == [["a"], ["b"], ["c", "d"]]
    assert shards_of([], 4) == [[]]


def test_missing_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected 12 bytes of data, found 8"):
        write_tensors(tmp_path, [TensorSpec("a", torch.float32, (3,))], lambda name: [torch.zeros(2)], lambda: None)


def test_all_file_formats_are_read(tensors, tmp_path):
    for kind in ("safetensors", "bin", "parts"):
        (tmp_path / kind).mkdir()
    save_file(tensors, tmp_path / "safetensors/model.safetensors")
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    halves = [dict([*tensors.items()][i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / f"parts/part-{i}.bin")
    names = {name: f"part-{i}.bin" for i, half in enumerate(halves) for name in half}
    (tmp_path / "parts/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    for kind in ("safetensors", "bin", "parts"):
        assert_same(mapped_tensors(tmp_path / kind), tensors)


def test_mapped_tensors_take_no_anonymous_memory(tmp_path):
    """Anonymous memory does not grow noticeably when a tensor of 64 MB is read."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs Linux's /proc")

    def anonymous() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon"))

    save_file({"a": torch.ones(16 << 20)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(16 << 20)}, tmp_path / "pytorch_model.bin")
    for _ in ("safetensors", "bin"):
        before = anonymous()
        (tensor,) = mapped_tensors(tmp_path).values()
        assert float(tensor.sum()) == 16 << 20
        assert anonymous() - before < 16 << 10  # kB
        (tmp_path / "model.safetensors").unlink(missing_ok=True)


class Code:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_unreadable_files_are_errors(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no weights here, expected model\.safetensors or pytorch_model\.bin"):
        mapped_tensors(tmp_path)
    torch.save({"a": Code()}, "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read as tensors alone"):
        mapped_tensors(tmp_path)
    assert not Path("ran").exists()
    torch.save({"state": {"a": torch.ones(2)}}, "pytorch_model.bin")
    with pytest.raises(UserError, match="expected a dict of tensors by name"):
        mapped_tensors(tmp_path)
    save_file(tensors, "model.safetensors")
    os.truncate("model.safetensors", 900)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        mapped_tensors(tmp_path)
    os.remove("model.safetensors")
    index = Path("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors cannot be read"):
        mapped_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: expected a JSON object with a weight_map"):
        mapped_tensors(tmp_path)
