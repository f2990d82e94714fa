"""Contract of raybge.compat.openvino: openvino and nncf import without their usage reports."""

import subprocess
import sys

CODE = """
import sys
from raybge.compat.openvino import import_without_telemetry
{before}
openvino, nncf = import_without_telemetry(), import_without_telemetry("nncf")
from openvino.tools.ovc import telemetry_utils
from nncf.telemetry import wrapper
assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub", telemetry_utils.tm
assert type(wrapper.telemetry).__name__ != "NNCFTelemetry" or not hasattr(wrapper.telemetry, "_impl"), wrapper.telemetry
loaded = sorted(name for name in sys.modules if name.startswith("openvino_telemetry"))
print(loaded, callable(openvino.Core), callable(nncf.quantize))
"""


def run(before: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE.format(before=before)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip().splitlines()[-1]


def test_nothing_is_reported():
    assert run("") == "[] True True"


def test_a_program_that_uses_the_reports_itself_keeps_them():
    assert run("import openvino_telemetry").startswith("['openvino_telemetry'")
