"""Object stores through fsspec: writing, listings, requests and errors, tried on a store in memory."""

import pickle
import posixpath

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations, register_implementation
from fsspec.spec import AbstractFileSystem

from raybge.cluster.remote_calls import unwrap_user_errors
from raybge.data.jsonl import Block, read_block
from raybge.data.source_files import list_files
from raybge.search.store import Store
from raybge.util.atomic_write import atomic_folder, atomic_stream, exists, open_atomic
from raybge.util.errors import UserError
from raybge.util.filesystem import StorageError, filesystem, is_local


class ObjectStore(MemoryFileSystem):
    """A bucket that may not be created, with a cache of listings, which records how its files are opened."""

    protocol = "s3"
    cache_types: list[str | None] = []  # noqa: RUF012
    find = AbstractFileSystem.find  # by way of `ls`, as in stores
    listings: dict[str, list] = {}  # noqa: RUF012

    def __init__(self, key=None, secret=None, anon=False, client_kwargs=None, use_listings_cache=True):
        if key == "bad":
            raise ValueError("key and region do not fit")
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.rpartition("://")[2])

    def makedirs(self, path, exist_ok=False):
        raise PermissionError(f"CreateBucket: {path}")

    def mkdir(self, path, create_parents=True, **more):
        raise PermissionError(f"CreateBucket: {path}")

    def rmdir(self, path):
        """Do nothing: there are no folders."""

    def invalidate_cache(self, path=None):
        self.listings.clear()

    def ls(self, path, detail=True, **more):
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True, **more)
        return self.listings[path] if detail else [info["name"] for info in self.listings[path]]

    def info(self, path, **more):
        for infos in self.listings.values():
            if infos and self._parent(path) == self._parent(infos[0]["name"]):
                known = [info for info in infos if info["name"] == self._strip_protocol(path)]
                if not known:
                    raise FileNotFoundError(path)
                return known[0]
        return super().info(path, **more)

    def _open(self, path, mode="rb", cache_type=None, **more):
        if mode == "rb":
            self.cache_types.append(cache_type)
        return super()._open(path, mode, **more)


@pytest.fixture
def bucket(monkeypatch):
    """The URI of a folder in a store, which is empty at first."""
    monkeypatch.setitem(_registry, "s3", None)  # removed afterwards
    register_implementation("s3", ObjectStore, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    ObjectStore.cache_types.clear()
    ObjectStore.listings.clear()
    yield "s3://bucket/folder"
    MemoryFileSystem.store.clear()


def stored() -> dict[str, bytes]:
    return {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}


def test_a_file_appears_when_it_is_complete(bucket):
    with open_atomic(f"{bucket}/a/out.jsonl?region=eu", "--output_file") as out:
        out.write(b"one\n")
        assert not exists(f"{bucket}/a/out.jsonl?region=eu", "--output_file")
    assert stored() == {"/bucket/folder/a/out.jsonl": b"one\n"} and exists(f"{bucket}/a/out.jsonl", "--output_file")
    with pytest.raises(RuntimeError), open_atomic(f"{bucket}/a/out.jsonl", "--output_file") as out:
        out.write(b"two\n")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_stream(*filesystem(f"{bucket}/b")) as out:
        raise RuntimeError
    assert stored() == {"/bucket/folder/a/out.jsonl": b"one\n"}


def test_a_folder_is_complete_with_its_last_file(bucket):
    for text in (b"old", b"new"):
        with atomic_folder(bucket, "--output_file", "_SUCCESS") as place:
            store = filesystem(bucket)[0]
            for part in range(2 if text == b"old" else 1):
                with store.open_output_stream(posixpath.join(place, f"part-{part}")) as out:
                    out.write(text)
            assert not exists(f"{bucket}/_SUCCESS", "--output_file")
    assert stored() == {"/bucket/folder/part-0": b"new", "/bucket/folder/_SUCCESS": b""}
    with pytest.raises(RuntimeError), atomic_folder(bucket, "--output_file", "_SUCCESS"):
        raise RuntimeError
    assert stored() == {}


def test_files_of_other_processes_are_seen(bucket):
    """fsspec reuses its file systems, and so their listings."""
    store, place = filesystem(bucket)
    with store.open_output_stream(f"{place}/one") as out:
        out.write(b"1")
    selector = pafs.FileSelector(place)
    assert len(store.get_file_info(selector)) == 1 and ObjectStore.listings
    MemoryFileSystem().pipe_file("/bucket/folder/two", b"2")  # of another process
    assert store.get_file_info(f"{place}/two").is_file
    MemoryFileSystem().pipe_file("/bucket/folder/three", b"3")
    assert len(store.get_file_info(selector)) == 3


def test_only_streams_read_ahead(bucket):
    MemoryFileSystem().pipe_file("/bucket/folder/rows.jsonl", b'{"query": "q"}\n' * 3)
    (file,) = list_files(bucket, "--f")
    assert len(list(read_block([file], Block(0, 0, file.size), dict))) == 3
    assert ObjectStore.cache_types == ["none"]
    store, place = filesystem(f"{bucket}/rows.jsonl")
    with store.open_input_stream(place) as stream:
        assert stream.read(2) == b'{"'
    assert ObjectStore.cache_types == ["none", None]
    with pytest.raises(FileNotFoundError):
        store.open_input_file(f"{place}.x")


@pytest.mark.parametrize("protocol", ["memory://x", "fsspec+file://{}/x"])
def test_other_file_systems_read_and_write(protocol, tmp_path):
    uri = protocol.format(tmp_path)
    with open_atomic(f"{uri}/a/b", "--f") as out:
        out.write(b"text")
    store, place = filesystem(f"{uri}/a/b")
    with store.open_input_file(place) as file:
        assert file.read() == b"text"
    with pickle.loads(pickle.dumps(store)).open_input_stream(place) as stream:
        assert stream.read() == b"text"
    MemoryFileSystem.store.clear()


def test_results_are_stored_at_a_uri(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, table = Store(bucket), pa.table({"n": [1, 2]})
    assert not store.local and not store.exists()
    store.write_table("ab", table)
    store.write_arrays("cd", x=np.arange(3), y=np.ones(2))
    again = pickle.loads(pickle.dumps(store))
    assert again.has("ab") and again.read("ab").equals(table) and again.table("ab").equals(table)
    assert again.arrays("cd", "x")["x"].tolist() == [0, 1, 2] and set(again.arrays("cd")) == {"x", "y"}
    again.remove_local_copies()
    again.remove()
    assert not store.exists() and stored() == {}


def test_an_option_that_the_store_rejects_is_an_error_of_the_uri(bucket):
    message = r"s3:// cannot be opened \(ValueError: key and region do not fit\)"
    with pytest.raises(StorageError, match=message):
        filesystem("s3://bad:secret@bucket/x")
    with pytest.raises(UserError, match=f"--f: .*{message}"):
        is_local("s3://bad:secret@bucket/x", "--f")


# --- no package -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_packages(monkeypatch):
    """Neither s3fs nor adlfs is installed."""
    for protocol in ("s3", "abfs"):
        monkeypatch.delitem(_registry, protocol, raising=False)
        entry = {"class": "no_such_module.FileSystem", "err": "Install a package"}
        monkeypatch.setitem(known_implementations, protocol, entry)


def test_pyarrow_serves_s3_without_s3fs(no_packages):
    store, place = filesystem("s3://key:secret@bucket/a?region=eu-west-1")
    assert isinstance(store, pafs.S3FileSystem) and place == "bucket/a" and store.region == "eu-west-1"


def test_the_package_is_named_together_with_pyarrows_reason(no_packages):
    with pytest.raises(StorageError, match=r"pip install 'raybge\[s3\]' \(pyarrow: .*[Pp]arse.*\)"):
        filesystem("s3://key:se/cret@bucket/a?region=eu-west-1")
    with pytest.raises(StorageError, match=r"abfs:// needs another package: Install a package \(pyarrow: .*nonsense"):
        filesystem("abfs://account@container/x?nonsense=1")


@pytest.mark.parametrize("place", ["s3://bucket", "gs://bucket", "abfs://account@container"])
def test_pyarrow_knows_these_protocols(place):
    """Contract: for these protocols the message quotes pyarrow's reason."""
    with pytest.raises(pa.ArrowInvalid, match="(?i)query parameter.*nonsense"):
        pafs.FileSystem.from_uri(f"{place}/x?nonsense=1")


# --- errors of Ray's workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UserError("the reason"), StorageError("the reason")])
def test_errors_that_users_correct_lose_rays_wrappers(error):
    with pytest.raises(UserError, match="^the reason$"), unwrap_user_errors():
        raise RuntimeError("task failed") from error
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    with pytest.raises(UserError, match="^the reason$"), unwrap_user_errors():
        raise RuntimeError(f"The actor died:\nTraceback ...\n{name}: the reason\n")
