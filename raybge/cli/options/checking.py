"""Flags of `raybge.selftest`."""

from __future__ import annotations

from dataclasses import dataclass

from raybge.cli.flag import flag
from raybge.cli.options.common import RUN


@dataclass(kw_only=True)
class SelftestOptions:
    """Check that a machine computes what raybge needs."""

    output_file: str | None = flag(None, RUN, "JSON file for the verdicts")
    device: str | None = flag(None, RUN, "device to check, such as cpu or cuda:0; default: the GPU if there is one")
    config: str | None = flag(None, RUN, "YAML file of flags; flags on the command line override it")
    verbose: bool = flag(False, RUN, "show the messages of other libraries")
