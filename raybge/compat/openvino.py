"""OpenVINO without its usage reports, which it and nncf send over the network when they are imported.

Both do without the package `openvino_telemetry` if it cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import cast

TELEMETRY = "openvino_telemetry"


def import_without_telemetry(name: str = "openvino") -> ModuleType:
    """Import openvino or nncf; in a process that has imported it before, nothing changes.

    Args:
        name: name of the module.

    Returns:
        The module.
    """
    before = sys.modules.get(TELEMETRY, False)
    sys.modules[TELEMETRY] = cast(ModuleType, None)  # an import of it then fails
    try:
        return importlib.import_module(name)
    finally:
        if before is False:
            del sys.modules[TELEMETRY]
        else:
            sys.modules[TELEMETRY] = cast(ModuleType, before)
