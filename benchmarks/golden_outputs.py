"""Read the output files of a run as arrays and compare them with those of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

TIME_KEYS = ("_runtime", "_per_second", "total_flos")  # of trainer_state.json: these differ between equal runs


def read_log(folder: Path) -> Arrays:
    """Return the series of trainer_state.json by name, each as rows of (step, value): loss, grad_norm, metrics, ..."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if not name.endswith(TIME_KEYS):
                series.setdefault(name, []).append((entry["step"], value))
    return {name: np.array(values, dtype=np.float64) for name, values in series.items()}


def read_weights(folder: Path) -> Arrays:
    """Return the tensors of model.safetensors by name."""
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / "model.safetensors")


def read_files(folder: Path) -> Arrays:
    """Return the bytes of all files in a folder by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): np.frombuffer(path.read_bytes(), np.uint8) for path in files}


def read_bytes(path: Path) -> Arrays:
    """Return the bytes of one file."""
    return {path.name: np.frombuffer(path.read_bytes(), np.uint8)}


def read_metrics(path: Path) -> Arrays:
    """Return the numbers of a metrics file by name."""
    metrics = json.loads(path.read_text())
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: np.array(value) for name, value in numbers.items() if "seconds" not in name}


def read_vectors(path: Path) -> Arrays:
    """Return the vectors of a .npy file, or the columns of a .parquet file."""
    if path.suffix == ".npy":
        return {path.name: np.load(path)}
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    arrays = {name: np.array(values) for name, values in columns.items()}
    return {**arrays, "schema": np.array(str(table.schema.remove_metadata()))}


@dataclass(frozen=True)
class Output:
    """A part of a run's results, read as named arrays.

    Args:
        path: of the file or folder, relative to the folder of the run.
        read: returns the arrays.
        noun: name of the output on the screen, with {n} for the number of arrays.
        initial: folder of the weights before training. With it the difference of two outputs is relative to the
            distance from these weights; without, to the largest value of each array.
        always_altered: true if the altered flags of a self-check must change this output.
    """

    path: str
    read: Callable[[Path], Arrays]
    noun: str
    initial: str | None = None
    always_altered: bool = True

    def compare(self, old: Path, new: Path, limit: float) -> Comparison:
        """Compare the outputs in the folders of two runs.

        Args:
            old: folder of a run.
            new: folder of the other run.
            limit: largest difference that counts as equal; 0: bit for bit.

        Returns:
            The comparison.

        Raises:
            ValueError: an output is empty, so that there is nothing to compare.
        """
        a, b = (self.read(folder / self.path) for folder in (old, new))
        if not all(array.size for array in (*a.values(), *b.values())) or not a:
            raise ValueError(f"an output is empty: {self.noun.format(n=len(a))} in {old} or {new}")
        initial = read_weights(Path(self.initial)) if self.initial else None
        figure = difference(a, b, initial)
        equal = figure <= limit if limit else identical(a, b)
        return Comparison(self.noun.format(n=len(a)), figure, equal)


@dataclass(frozen=True)
class Comparison:
    """The result of one comparison."""

    subject: str
    figure: float
    equal: bool

    def __str__(self) -> str:
        """Return the output and the figure as text."""
        return f"{self.subject} {self.figure:.2g}"


def identical(old: Arrays, new: Arrays) -> bool:
    """Return true if names, shapes, types and all bits are equal."""
    return old.keys() == new.keys() and all(
        a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in ((old[name], new[name]) for name in old)
    )


def difference(old: Arrays, new: Arrays, initial: Arrays | None = None) -> float:
    """Return the relative difference of two outputs.

    Args:
        old: arrays by name.
        new: arrays by name.
        initial: weights before training, possibly with a prefix before their names.

    Returns:
        0 if all bits are equal; inf for other names, shapes or types, and for text; else ||new - old|| / ||old -
        initial|| over all tensors, or without `initial` the largest |new - old| / max |old| of all arrays.
    """
    if identical(old, new):
        return 0.0
    if old.keys() != new.keys() or any(old[n].shape != new[n].shape or old[n].dtype != new[n].dtype for n in old):
        return float("inf")
    if any(array.dtype.kind not in "fi" for array in old.values()):
        return float("inf")
    with np.errstate(all="ignore"):
        a, b = ({name: array.astype(np.float64) for name, array in each.items()} for each in (old, new))
        if initial is None:
            ratios = [
                np.abs(b[name] - a[name]).max(initial=0) / max(np.abs(a[name]).max(initial=0), 1e-12) for name in a
            ]
            figure = max(map(float, ratios))
        else:
            apart = np.sqrt(sum(np.square(b[name] - a[name]).sum() for name in a))
            figure = float(apart / movement(a, initial))
    return figure if np.isfinite(figure) else float("inf")


def movement(weights: Arrays, initial: Arrays) -> float:
    """Return the distance between trained and initial weights, over the tensors that both have."""
    pairs = [(weight, initial.get(name, initial.get(f"bert.{name}"))) for name, weight in weights.items()]
    return float(np.sqrt(sum(np.square(weight - start).sum() for weight, start in pairs if start is not None)))
