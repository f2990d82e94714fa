#!/bin/sh
# Renews requirements/lock-cpu.txt and lock-gpu.txt from pyproject.toml: `requirements/lock.sh`. Needs uv (pip install uv);
# installing from the locks does not. Versions that still fit stay as they are; `requirements/lock.sh --upgrade` takes the newest.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "torch==2.13.0" >"$work/torch.txt"

# Ray and make rule out these, so their lines and the markers that only speak of them go.
elsewhere="/== '(win32|emscripten)'/d
s/ ; (sys_platform != 'emscripten'|platform_python_implementation != 'PyPy')\$//
s/ ; implementation_name != 'PyPy' and platform_python_implementation != 'PyPy'\$//
s/ ; implementation_name == 'pypy' or .*\$//
s/ ; sys_platform != 'emscripten' and sys_platform != 'win32'\$//
s/python_full_version < '3.15' and //"

for hardware in cpu gpu; do
    lock=requirements/lock-$hardware.txt
    [ ! -f "$lock" ] || cp "$lock" "$work/$hardware.txt"
    uv pip compile pyproject.toml --extra "$hardware" --extra demo --extra dev --universal --python-version 3.11 \
        --constraints "$work/torch.txt" --no-annotate --no-header --quiet --output-file "$work/$hardware.txt" "$@" >/dev/null
    sed -E "$elsewhere" "$work/$hardware.txt" >"$work/lines.txt"
    if [ "$hardware" = cpu ]; then
        # The CPU build of torch wants none of the CUDA libraries that the plain build names.
        grep -v -E '^(nvidia-|cuda-|triton==)' "$work/lines.txt" >"$work/cpu-lines.txt"
        mv "$work/cpu-lines.txt" "$work/lines.txt"
    fi
    {
        echo "# Exact versions for Python 3.11 to 3.13, written by requirements/lock.sh: change pyproject.toml and run that."
        cat "$work/lines.txt"
    } >"$lock"
done
