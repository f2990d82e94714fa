"""Paths and URIs, and the file system of each: local paths by pyarrow, URIs by fsspec."""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raybge.util.errors import UserError, first_line
from raybge.util.redaction import LOGIN

STATE_FOLDER = ".raybge"  # in the output folder: internal files of a run

# Protocols that pyarrow serves itself: fsspec would only wrap it.
_PYARROW = ("file", "hdfs", "viewfs", "mock")
# Protocols that pyarrow serves where fsspec has no package for them.
_PYARROW_AS_WELL = ("s3", "gs", "gcs", "abfs", "abfss")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra of raybge that installs its package
# Protocols without folders: a key may contain slashes, and nothing has to exist before it.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
_LOGIN_AND_KEY = re.compile(rf"(?:({LOGIN})@)?(.*)", re.DOTALL)


class StorageError(UserError, pa.ArrowInvalid):
    """Error of a URI that cannot be opened. Handlers of pyarrow's errors add the flag to it."""


class _UnsupportedQuery(Exception):
    """The query of a URI has a parameter without a counterpart in fsspec."""


def last_part(path: str) -> str:
    """Return the last part of a path or URI."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """Return pyarrow's file system for a path or URI, and the path within it.

    Local paths and `file://` get pyarrow's LocalFileSystem. Other URIs get a PyFileSystem over fsspec, with or without
    the prefix `fsspec+`; percent-encoded characters are decoded, except in `http://`. In `s3://` and `gs://`,
    credentials and the query are passed on as the options of s3fs and gcsfs:

    - `s3://KEY:SECRET@bucket`: `key` and `secret`; `s3://anonymous@bucket`: `anon`.
    - `region`: `client_kwargs["region_name"]`; `endpoint_override` and `scheme` (default: https):
      `client_kwargs["endpoint_url"]`.
    - `gs://anonymous@bucket`: `token="anon"`; `project_id`: `project`; `endpoint_override` and `scheme`:
      `endpoint_url`.

    pyarrow's own S3 and GCS are used if s3fs or gcsfs is not installed, or if the query has another parameter.

    Raises StorageError if no installed package opens the URI, and then names the package to install, or if the package
    rejects the URI.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    protocol = path.partition("://")[0]
    if protocol in _PYARROW:
        return _from_pyarrow(path)
    try:
        return _from_fsspec(path.removeprefix("fsspec+"))
    except _UnsupportedQuery:
        return _from_pyarrow(path)
    except ImportError as error:
        message = _missing_package(protocol.removeprefix("fsspec+"), error)
        if protocol not in _PYARROW_AS_WELL:
            raise StorageError(message) from error
    try:
        return _from_pyarrow(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StorageError(f"{message} (pyarrow: {first_line(error)})") from error


def _from_pyarrow(uri: str) -> tuple[pafs.FileSystem, str]:
    store, place = pafs.FileSystem.from_uri(uri)
    return store, str(place)


def _from_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    from fsspec.core import get_filesystem_class, url_to_fs

    protocol, _, rest = uri.partition("://")
    options: dict[str, Any] = {}
    if protocol in _EXTRAS:
        address, _, query = rest.partition("?")
        login, key = _split_login(address)
        options = _OPTIONS[_EXTRAS[protocol]](login, dict(urllib.parse.parse_qsl(query)))
        options["use_listings_cache"] = False
        uri = f"{protocol}://{urllib.parse.unquote(key)}"
    elif protocol not in ("http", "https"):
        uri = f"{protocol}://{urllib.parse.unquote(rest)}"
    try:
        for name in protocol.split("::"):  # simplecache::s3://
            get_filesystem_class(name)
    except ValueError as error:
        raise StorageError(f"{protocol}:// is not a protocol that fsspec supports") from error
    try:
        store, place = url_to_fs(uri, **options)
    except (OSError, ImportError, pa.ArrowException):
        raise
    except Exception as error:  # of the options, or of the store's own library
        raise StorageError(f"{protocol}:// cannot be opened ({type(error).__name__}: {first_line(error)})") from error
    store.invalidate_cache()  # fsspec reuses its file systems
    return pafs.PyFileSystem(FsspecHandler(_ErrorTranslator(store), protocol in _OBJECT_STORES)), str(place)


def _split_login(address: str) -> tuple[str, str]:
    """Split `KEY:SECRET@bucket/key`. A secret may contain "/", and so may a key in the bucket contain "@"."""
    match = _LOGIN_AND_KEY.fullmatch(address)
    assert match is not None  # the pattern matches every text
    return match[1] or "", match[2]


class _ErrorTranslator:
    """A file system of fsspec, or an open file of it, whose methods raise OSError.

    Stores raise errors of their own libraries (botocore, google.auth), which callers could neither report nor retry.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these before `_target` is set
            raise AttributeError(name)
        value = getattr(self._target, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = value(*args, **kwargs)
            except (OSError, pa.ArrowException, NotImplementedError, TypeError, ValueError):
                raise
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {first_line(error)}") from error
            return _ErrorTranslator(result) if name == "open" else result

        return call


class FsspecHandler(pafs.FSSpecHandler):
    """pyarrow's handler with what raybge requires of a store.

    - Modification times of object stores, by which changed files are recognized.
    - Listings without a cache: other processes write too.
    - Object stores: no read-ahead in files opened for random access (50 MiB in s3fs; raybge reads ranges of its own),
      and no folders, since s3fs and gcsfs would try to create the bucket.

    Args:
        fs: fsspec's file system.
        is_object_store: the file system has keys, but no folders.
    """

    def __init__(self, fs: Any, is_object_store: bool = False) -> None:
        super().__init__(fs)
        self.is_object_store = is_object_store

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Return the present state of paths."""
        self.fs.invalidate_cache()
        return list(super().get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """Return the present content of a folder."""
        self.fs.invalidate_cache()
        return list(super().get_file_info_selector(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Create a folder, except in object stores."""
        if not self.is_object_store:
            super().create_dir(path, recursive)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open a file for random access; streams keep the read-ahead."""
        if not self.is_object_store:
            return super().open_input_file(path)
        if not self.fs.isfile(path):
            raise FileNotFoundError(path)
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")

    @staticmethod
    def _create_file_info(path: str, info: dict[str, Any]) -> pafs.FileInfo:
        names = ("mtime", "LastModified", "last_modified", "updated")
        modified = next((info[name] for name in names if info.get(name)), None)
        return super(FsspecHandler, FsspecHandler)._create_file_info(path, {**info, "mtime": modified})


def _s3_options(login: str, query: dict[str, str]) -> dict[str, Any]:
    key, _, secret = (urllib.parse.unquote(part) for part in login.partition(":"))
    options: dict[str, Any] = {"key": key, "secret": secret} if secret else {"anon": True} if key else {}
    client = {"region_name": query.pop("region")} if "region" in query else {}
    if endpoint := _endpoint(query):
        client["endpoint_url"] = endpoint
    return options | ({"client_kwargs": client} if client else {})


def _gcs_options(login: str, query: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"token": "anon"} if login else {}
    if "project_id" in query:
        options["project"] = query.pop("project_id")
    if endpoint := _endpoint(query):
        options["endpoint_url"] = endpoint
    return options


def _endpoint(query: dict[str, str]) -> str | None:
    """Take the endpoint out of the query, which has to be empty afterwards."""
    scheme, host = query.pop("scheme", "https"), query.pop("endpoint_override", None)
    if query:
        raise _UnsupportedQuery
    return host and (host if "://" in host else f"{scheme}://{host}")


_OPTIONS = {"s3": _s3_options, "gcs": _gcs_options}


def _missing_package(protocol: str, error: ImportError) -> str:
    if protocol in _EXTRAS:
        return f"{protocol}:// needs another package: pip install 'raybge[{_EXTRAS[protocol]}]'"
    return f"{protocol}:// needs another package: {first_line(error)}"


def is_local(path: str, flag: str) -> bool:
    """Return True if a path or URI is in a file system of this machine.

    Raises UserError if the URI cannot be opened.
    """
    try:
        return "://" not in path or isinstance(filesystem(path)[0], pafs.LocalFileSystem)
    except (OSError, ValueError, ImportError, pa.ArrowException) as err:
        raise UserError(f"{flag}: {path} cannot be opened ({first_line(err)})") from err


def append_to_path(path: str, ending: str) -> str:
    """Append text to a path or URI; the query of a URI (region, endpoint) stays at the end."""
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{head.rstrip('/')}{ending}{mark}{query}"
