"""Versions of raybge and of the packages that it depends on."""

from __future__ import annotations

RAYBGE = "0.1.0"  # the only place: pyproject.toml reads it here


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of raybge and of installed `packages` by name."""
    from importlib.metadata import version  # takes a tenth of the time of --help

    return {"raybge": RAYBGE, **{name: version(name) for name in packages}}
