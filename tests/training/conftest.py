"""Fixtures of the tests that train a small model in the test's own process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny
from trainers import build_survey, build_trainer

from raybge.data.survey import Survey
from raybge.training.trainer import StreamTrainer


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny model with dropout: a resumed run must restore the random state too."""
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dropout=0.1)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Return a survey of 50 groups."""
    return build_survey(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_trainer(dropout_model: str, survey: Survey, tmp_path: Path) -> Callable[..., StreamTrainer]:
    """Return a function that builds a StreamTrainer on these groups; its flags are those of TrainingArguments."""

    def make(
        callbacks: Any = (), validation: Any = None, folder: Path = tmp_path, model: str = dropout_model, **more: Any
    ) -> StreamTrainer:
        return build_trainer(survey, model, folder, callbacks, validation=validation, **more)

    return make
