"""Random damages of model folders: equal vectors, or refused by name; never another error or a wrong vector."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from damages import is_other_model, make_folders, outcome, vectors
from hypothesis import given
from inputs import share, tried


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Any]]:
    folders = make_folders(tmp_path_factory.mktemp("whole"))
    return [(folder, vectors(folder)) for folder in folders]


@share(2)
@given(seed=st.integers(0, 2**62))
def test_damaged_folders(whole, tmp_path_factory, seed):
    folder, expected = whole[seed % len(whole)]
    with tried("damaged model folders"):
        done, result = outcome(folder, tmp_path_factory.getbasetemp() / "damaged", expected, seed)
        assert result != "different" or (done and is_other_model(done)), (folder.name, seed, done)
