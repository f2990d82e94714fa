"""The model card of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Card:
    """What a run's README.md says."""

    base_model: str
    data: list[tuple[str, int]]
    flags: dict[str, Any]
    history: list[dict[str, Any]]
    before: dict[str, float] | None
    after: dict[str, float] | None
    versions: dict[str, str]

    def text(self) -> str:
        """The card."""
        return f"# {self.base_model}\n\nbefore {self.before}, after {self.after}\n"

    def write(self, folder: Path) -> None:
        """Write README.md."""
        (Path(folder) / "README.md").write_text(self.text())
