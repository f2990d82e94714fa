"""Export of a model: check, export in a process of its own, compare, write the folder at once."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.console import Console
from raybge.cli.options import ExportOptions
from raybge.data.groups import parse_passage
from raybge.data.survey import survey
from raybge.data.text_sample import sample_texts
from raybge.exporting.spec import ExportSpec
from raybge.model.backends.export_process import run_export
from raybge.model.backends.exported_models import ExportedModel, export_request
from raybge.model.preflight import SAMPLE_BLOCKS, SAMPLE_CHARACTERS
from raybge.search.inputs import BLOCK_BYTES
from raybge.util.atomic_write import atomic_folder


@dataclass(frozen=True)
class ExportResult:
    """Result of `raybge.export_model`.

    Args:
        output_dir: the model's folder.
        file: the exported file in it, the `file_name` of sentence-transformers.
        cosine: cosine of the exported model's vectors to fp32 on the sample texts, on average.
        min_cosine: the least one.
    """

    output_dir: str
    file: str
    cosine: float
    min_cosine: float


def export(options: ExportOptions, console: Console) -> ExportResult:
    """Run the command.

    Args:
        options: the command's options.
        console: the console.

    Returns:
        The folder and the cosines.

    Raises:
        UserError: invalid flags, files or rows, or a model that cannot be exported.
    """
    spec = ExportSpec.from_options(options)
    texts = None
    if spec.samples:
        rows = survey(spec.samples, BLOCK_BYTES, parse_passage, "stop", None)
        texts = sample_texts(rows, parse_passage, SAMPLE_CHARACTERS, SAMPLE_CHARACTERS, SAMPLE_BLOCKS)
    with console.phase("checking the model"):
        spec.model.check(None if texts is None else lambda: texts)
    with console.phase(f"exporting the model to {spec.choice.backend}"):
        with atomic_folder(spec.output_dir, "--output_dir") as folder:
            record = run_export(export_request(spec.model.keywords(), spec.choice, folder, whole=True, texts=texts))
    console.info(ExportedModel(spec.output_dir, spec.choice, record).describe())
    console.info(f"written: {spec.output_dir}")
    cosine = record["cosine"]
    return ExportResult(spec.output_dir, spec.choice.file, cosine["mean"], cosine["min"])
