"""The model of a finished run: moved into the output folder as a whole, and marked as finished by its metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from raybge.model.upload import MODEL_FILES
from raybge.report.page import REPORT
from raybge.util.errors import UserError

RESULTS = "train_results.json"  # in the output folder, written last: the run is finished


def finished_metrics(output: Path) -> dict[str, float] | None:
    """Return the metrics of the finished run whose model is in `output`; None if there is none."""
    try:
        return json.loads((output / RESULTS).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{output / RESULTS} cannot be read ({error})") from error


# A file of the old model next to the new one, adapters or another tokenizer's for example, would be loaded with it.
_OLD_FILES = (*MODEL_FILES, REPORT, "trainer_state.json")


def publish_model(staging: Path, output: Path) -> None:
    """Move a finished run's model from `staging` to `output`, on the same file system.

    The folders cannot be swapped because `output` holds other files too. Hence the order: first RESULTS is deleted,
    then the files that make the old model loadable, then its other files; of the new model config.json and modules.json
    are moved after its other files, and RESULTS last. At any moment in between no mixture can be loaded, and the run
    counts as unfinished.
    """
    (output / RESULTS).unlink(missing_ok=True)
    for pattern in _OLD_FILES:
        for old in output.glob(pattern):
            if old.is_file():
                old.unlink()
            if old.parent != output and not any(old.parent.iterdir()):
                old.parent.rmdir()
    last = ("config.json", "modules.json", RESULTS)
    for path in sorted(staging.iterdir(), key=lambda p: (last.index(p.name) if p.name in last else -1, p.name)):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    staging.rmdir()
