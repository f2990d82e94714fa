"""Atomic writes: a file appears under its name only when it is complete."""

import gzip
import os
import platform
import subprocess
import sys

import pyarrow as pa
import pytest

from raybge.util.atomic_write import exists, open_atomic
from raybge.util.errors import UserError


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_file_appears_at_the_end(tmp_path, prefix):
    path = tmp_path / "a" / "b" / "out.jsonl"
    with open_atomic(f"{prefix}{path}", "--output_file") as out:
        out.write(b"one\n")
        assert not path.exists() and not exists(f"{prefix}{path}", "--output_file")
    assert path.read_bytes() == b"one\n" and exists(f"{prefix}{path}", "--output_file")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_existing_file_stays_if_writing_fails(tmp_path, error):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(error), open_atomic(str(path), "--output_file") as out:
        out.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_partial_files_of_killed_processes_are_deleted(tmp_path):
    path, host = tmp_path / "out[1].jsonl", platform.node()
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f"{path.name}.part-{host}-{int(killed.stdout)}"
    others = {f"{path.name}.part-{host}-{os.getppid()}", f"{path.name}.part-elsewhere-{int(killed.stdout)}"}
    for name in (left.name, *others):
        (tmp_path / name).write_bytes(b"half")
    with open_atomic(str(path), "--output_file") as out:
        out.write(b"whole")
    assert {each.name for each in tmp_path.iterdir()} == {path.name, *others}


def test_the_ending_selects_the_compression(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.jsonl"):
        with open_atomic(str(tmp_path / name), "--output_file") as out:
            out.write(b"text\n" * 9)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b"text\n" * 9
    with pa.input_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        assert stream.read() == b"text\n" * 9
    assert (tmp_path / "a.jsonl").read_bytes() == b"text\n" * 9


def test_paths_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_file: .*file/out.jsonl cannot be written"):
        with open_atomic(str(tmp_path / "file" / "out.jsonl"), "--output_file"):
            pass
    with pytest.raises(UserError, match=r"--output_file: .* is a folder"):
        exists(str(tmp_path), "--output_file")
    with pytest.raises(UserError, match=r"--output_file: nothing://x cannot be written"):
        exists("nothing://x", "--output_file")
