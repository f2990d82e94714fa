"""Completion of commands and flags in a shell, by the library argcomplete.

eval "$(register-python-argcomplete raybge)"
"""

from __future__ import annotations

import argparse
import os

from raybge.cli import options
from raybge.cli.help_page import argument_parser
from raybge.cli.parser import declared_flags

OPTIONS: dict[str, type] = {
    "mine": options.MineOptions,
    "pretrain": options.PretrainOptions,
    "train": options.TrainOptions,
    "tune": options.TuneOptions,
    "merge": options.MergeOptions,
    "evaluate": options.EvaluateOptions,
    "encode": options.EncodeOptions,
    "export": options.ExportOptions,
    "demo": options.DemoOptions,
    "selftest": options.SelftestOptions,
}


def complete() -> None:
    """Print the completions of a command line and exit, if a shell asks for them; otherwise do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser(prog="raybge")
    commands = parser.add_subparsers()
    for name, options_class in OPTIONS.items():
        parents = []
        if name in words:  # the flags of one command: reading those of all takes longer than a person waits
            flags = [f for f in declared_flags(options_class).values() if not f.refused and not f.no_effect]
            parents = [argument_parser("", flags, name, show_all=True)]
        commands.add_parser(name, parents=parents, add_help=False)
    argcomplete.autocomplete(parser)
