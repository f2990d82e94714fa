"""ExportSpec: the options of `raybge.export`, checked and resolved before the model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from raybge.cli.options import ExportOptions
from raybge.data.source_files import SourceFile, list_files
from raybge.data.survey import IN_PROCESS_BYTES
from raybge.model.backends.choice import BackendChoice
from raybge.model.folder_checks import check_model_folder
from raybge.model.spec import EncoderSpec, absolute_model_path
from raybge.util.errors import UserError


@dataclass(frozen=True)
class ExportSpec:
    """An export.

    Args:
        model: the model in torch.
        choice: backend and precision.
        output_dir: folder to write.
        samples: files of sample texts; None: docstrings of Python's library.
    """

    model: EncoderSpec
    choice: BackendChoice
    output_dir: str
    samples: list[SourceFile] | None

    @classmethod
    def from_options(cls, options: ExportOptions) -> ExportSpec:
        """Check and resolve the options.

        Args:
            options: the command's options.

        Returns:
            The spec.

        Raises:
            UserError: an invalid flag, a package that is not installed, or a folder that is not empty.
        """
        choice = BackendChoice.of(options.encode_backend, options.encode_precision, None)
        choice.check_installed()
        check_model_folder(options.model_name_or_path, "--model_name_or_path")
        output = options.output_dir
        if "://" in output:
            raise UserError(f"--output_dir {output}: expected a folder of this machine, found a URI")
        if os.path.realpath(output) == os.path.realpath(options.model_name_or_path):
            raise UserError(f"--output_dir {output} is the folder of the model; choose another one")
        if os.path.isfile(output):
            raise UserError(f"--output_dir {output}: expected a folder, found a file")
        if os.path.isdir(output) and os.listdir(output) and not options.overwrite_output_dir:
            raise UserError(f"--output_dir {output} is not empty: choose another folder, or --overwrite_output_dir")
        samples = None
        if options.sample_data:
            samples = list_files(options.sample_data, "--sample_data", options.accept_any_text)
            if (size := sum(file.size for file in samples)) > IN_PROCESS_BYTES:
                raise UserError(
                    f"--sample_data has {size / 1e6:,.0f} MB: give at most {IN_PROCESS_BYTES / 1e6:,.0f} MB; some "
                    "hundreds of passages are enough"
                )
        model = EncoderSpec(
            absolute_model_path(options.model_name_or_path),
            cache_dir=options.cache_dir,
            trust_remote_code=options.trust_remote_code,
        )
        return cls(model, choice, output, samples)
