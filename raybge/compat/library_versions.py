"""Versions of the libraries whose private parts raybge uses: the tested ones, and errors that name them."""

from __future__ import annotations

import importlib
from typing import Any

LIBRARIES = ("ray", "torch", "transformers", "accelerate")


class UnsupportedVersionError(Exception):
    """A library lacks a name that raybge needs. The message names both versions and what to install."""


def require(owner: Any, name: str, library: str) -> Any:
    """Return an attribute of a library's module or class.

    Args:
        owner: module, class or object of the library.
        name: name of the attribute.
        library: name of the library's distribution.

    Returns:
        The attribute.

    Raises:
        UnsupportedVersionError: the attribute does not exist.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise _missing(f"{where}.{name}", library) from None


def require_module(name: str, library: str) -> Any:
    """Import a private module of a library.

    Args:
        name: full name of the module.
        library: name of the library's distribution.

    Returns:
        The module.

    Raises:
        UnsupportedVersionError: the module does not exist.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(f"module {name}", library) from None


def untested_versions() -> list[str]:
    """Return a line for each installed library whose version raybge was not tested with."""
    from packaging.specifiers import SpecifierSet

    lines = []
    for library in LIBRARIES:
        tested = _tested(library)
        specifiers = SpecifierSet(tested.removeprefix(library))
        installed = _installed(library)
        if installed and not specifiers.contains(installed, prereleases=True):
            lines.append(f"{library} {installed} is not tested with raybge: pip install '{tested}'")
    return lines


def _missing(name: str, library: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"{library} {_installed(library)} has no {name}, which raybge uses: install {_tested(library)}"
    )


def _installed(library: str) -> str:
    """Return the version of a library; "" if it was not installed as a package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _tested(library: str) -> str:
    """Return what the installed raybge requires, for example "ray==2.60.*"; the name alone if it is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires("raybge") or ()]
    except PackageNotFoundError:  # run from its source
        return library
    own = next((each for each in requirements if each.name == library and not each.marker), None)
    return f"{library}{own.specifier}" if own else library
