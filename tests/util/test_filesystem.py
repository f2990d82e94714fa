"""URIs: fsspec with the options that a URI carries, pyarrow where fsspec has no package, and errors that name it."""

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, register_implementation

from raybge.data.source_files import list_files, open_stream
from raybge.util import filesystem as module
from raybge.util.errors import UserError
from raybge.util.filesystem import append_to_path, filesystem, is_local


@pytest.fixture
def stores(monkeypatch):
    """s3 and gs URIs open a store in memory; the list has the options of each."""
    options = []

    class Store(MemoryFileSystem):
        protocol = ("s3", "gs", "s3a")
        cachable = False

        def __init__(self, **more):
            options.append({k: v for k, v in more.items() if k != "use_listings_cache"})
            super().__init__(**more)

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.rpartition("://")[2])

        def info(self, path, **more):
            return {**super().info(path, **more), "LastModified": 7.0}

    for name in Store.protocol:
        monkeypatch.setitem(_registry, name, None)  # removed afterwards
        register_implementation(name, Store, clobber=True)
    yield options
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("s3://bucket/a%20b", {}),
        ("s3://key:se%2Fcret@bucket/a%20b", {"key": "key", "secret": "se/cret"}),
        ("s3://key:se/cret@bucket/a%20b", {"key": "key", "secret": "se/cret"}),
        ("s3://user@bucket/a%20b", {"anon": True}),
        ("s3://anonymous@bucket/a%20b?region=eu", {"anon": True, "client_kwargs": {"region_name": "eu"}}),
        ("s3://bucket/a%20b?endpoint_override=host:9", {"client_kwargs": {"endpoint_url": "https://host:9"}}),
        ("s3a://bucket/a%20b?endpoint_override=h&scheme=http", {"client_kwargs": {"endpoint_url": "http://h"}}),
        ("gs://anonymous@bucket/a%20b?project_id=p", {"token": "anon", "project": "p"}),
        ("gs://bucket/a%20b?endpoint_override=http://h", {"endpoint_url": "http://h"}),
    ],
)
def test_credentials_and_query_become_options(stores, uri, options):
    _, path = filesystem(uri)
    assert stores == [options] and path.lstrip("/") == "bucket/a b"


@pytest.mark.parametrize(
    ("uri", "options", "path"),
    [
        ("s3://bucket/a@b", {}, "bucket/a@b"),
        ("s3://bucket/x:y@z", {}, "bucket/x:y@z"),
        ("s3://key:secret@bucket/a@b/c:d@e", {"key": "key", "secret": "secret"}, "bucket/a@b/c:d@e"),
        ("s3://key:se/cret@bucket/a@b", {"key": "key", "secret": "se/cret"}, "bucket/a@b"),
        ("gs://anonymous@bucket/a@b", {"token": "anon"}, "bucket/a@b"),
    ],
)
def test_a_key_may_contain_an_at_sign(stores, uri, options, path):
    assert filesystem(uri)[1].lstrip("/") == path and stores == [options]


def test_the_time_of_a_stored_object_is_known(stores):
    store, path = filesystem("s3://bucket/file")
    with store.open_output_stream(path) as out:
        out.write(b"x")
    assert store.get_file_info(path).mtime.timestamp() == 7 and store.get_file_info(path).size == 1


def test_pyarrow_serves_other_parameters_and_missing_packages(monkeypatch):
    served = []

    class FileSystem:
        @staticmethod
        def from_uri(uri):
            served.append(uri)
            return None, uri

    monkeypatch.setattr(module.pafs, "FileSystem", FileSystem)
    for uri in ("s3://bucket/x?allow_bucket_creation=true&region=eu", "hdfs://host/x"):
        assert filesystem(uri) == (None, uri) and served.pop() == uri


def test_local_paths_are_pyarrows_own(tmp_path):
    for path in (str(tmp_path), f"file://{tmp_path}"):
        store, place = filesystem(path)
        assert isinstance(store, pafs.LocalFileSystem) and place == str(tmp_path)
    store, place = filesystem(f"fsspec+file://{tmp_path}")
    assert isinstance(store, pafs.PyFileSystem) and place == str(tmp_path)


@pytest.mark.parametrize("uri", ["fsspec+s3://bucket/x", "fsspec+gs://bucket/x"])
def test_a_missing_package_is_named(uri, monkeypatch):
    def absent(protocol, **_):
        raise ImportError(f"Install it to access {protocol}")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(UserError, match=r"needs another package: pip install 'raybge\[(s3|gcs)\]'"):
        filesystem(uri)
    with pytest.raises(UserError, match="--f: .* cannot be opened .*needs another package"):
        is_local(uri, "--f")


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="nonsense:// is not a protocol"):
        filesystem("nonsense://a")


def test_an_ending_goes_before_the_query():
    assert append_to_path("s3://b/x/?region=eu", "/y") == "s3://b/x/y?region=eu"
    assert append_to_path("a?b/", ".json") == "a?b.json"


class StrictStore(MemoryFileSystem):
    """A store that accepts no options of its base class and raises errors of a library of its own."""

    protocol = "strict"

    class LibraryError(Exception):
        """Neither an OSError nor one of pyarrow's errors."""

    def __init__(self):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("strict://"))

    def info(self, path, **more):
        if path.endswith("denied"):
            raise self.LibraryError("no credentials")
        return super().info(path, **more)

    def _open(self, path, mode="rb", **more):
        if path.endswith("broken"):
            raise self.LibraryError("connection lost")
        return super()._open(path, mode, **more)


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setitem(_registry, "strict", None)  # removed afterwards
    register_implementation("strict", StrictStore, clobber=True)
    yield
    MemoryFileSystem.store.clear()


def test_errors_of_a_stores_library_are_os_errors(strict):
    store, path = filesystem("strict://denied")
    with pytest.raises(OSError, match="LibraryError: no credentials"):
        store.get_file_info(path)
    with pytest.raises(OSError, match="LibraryError: connection lost"):
        store.open_output_stream("broken")
    with pytest.raises(UserError, match="--f: strict://denied cannot be opened"):
        list_files("strict://denied", "--f")


def test_names_below_a_uri_are_decoded(strict):
    store, path = filesystem("strict://folder/a b%20c.jsonl")
    assert path.lstrip("/") == "folder/a b c.jsonl"
    with store.open_output_stream(path) as out:
        out.write(b'{"query": "q"}\n')
    (file,) = list_files("strict://folder", "--f")
    assert file.name == "strict://folder/a b c.jsonl"
    with open_stream(file) as stream:
        assert stream.read() == b'{"query": "q"}\n'
