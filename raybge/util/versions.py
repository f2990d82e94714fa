"""Versions of raybge and of the packages that it depends on."""

from __future__ import annotations

RAYBGE = "0.1.0"  # the only place: pyproject.toml reads it here


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of raybge and of installed `packages` by name."""
    from importlib.metadata import version  # takes a tenth of the time of --help

    return {"raybge": RAYBGE, **{name: version(name) for name in packages}}


def sentence_transformers_version() -> str:
    """Return the installed version of sentence-transformers, else the first one that reads all of raybge's files."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sentence-transformers")
    except PackageNotFoundError:
        return "3.0.0"
