#!/bin/sh
# Builds .venv from a lock, anew: `requirements/venv.sh cpu|gpu`. What `make venv` calls when the lock or PYTHON changed.
# PYTHON names the interpreter; without it the first on PATH that serves is taken. pip's own settings say where packages come from.
set -eu
cd "$(dirname "$0")/.."
hardware=$1
lock=requirements/lock-$hardware.txt
stamp=.venv/.locked-$hardware
log=.venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    echo "make venv: $*" >&2
    exit 1
}

# Does $1 run (a pyenv shim can be on PATH and run nothing), is it a Python that raybge supports, can it build an environment?
serves() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 </dev/null
}

find_python() (
    IFS=:
    for name in python3.11 python3.12 python3.13 python3; do
        for folder in $PATH; do
            if [ -x "$folder/$name" ] && serves "$folder/$name"; then
                echo "$folder/$name"
                return
            fi
        done
    done
)

pip_install() {
    .venv/bin/python -m pip install "$@" >>"$log" 2>&1 </dev/null
}

fail_with_log() {
    tail -n 30 "$log" >&2
    fail "$1 (the whole story: $log)"
}

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    serves "$python" || fail "PYTHON=$python does not run, is not Python 3.11 to 3.13, or lacks the modules venv and ensurepip"
else
    python=$(find_python)
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 found that runs and has the modules venv and ensurepip" \
        "(Debian, Ubuntu: apt-get install python3-venv); one that is not on PATH: make venv PYTHON=/path/to/python3"
fi

# A lock that only looks new (git gives files the time of the checkout) needs nothing built.
minor='import sys; print(sys.version_info[:2])'
if cmp -s "$lock" "$stamp" && { [ -z "${PYTHON:-}" ] || [ "$(.venv/bin/python -c "$minor")" = "$("$python" -c "$minor")" ]; }; then
    [ ! "$lock" -nt "$stamp" ] || touch "$stamp"
    exit 0
fi

[ "$hardware" = gpu ] && with=with || with=without
started=$(date +%s)
echo "make venv: $("$python" -V), $(grep -c '==' "$lock") packages for a machine $with a GPU, some minutes; details in $log"
# From nothing each time: what the lock no longer names must go, and faiss-cpu and faiss-gpu must never meet.
"$python" -m venv --clear .venv || fail "$python -m venv .venv failed"

torch=$(grep '^torch==' "$lock")
if [ "$hardware" = gpu ]; then
    torch="$torch,!=${torch#torch==}+cpu"
elif pip_install --no-deps "$torch+cpu"; then
    torch=$torch+cpu
elif grep -q 'No matching distribution found' "$log"; then
    [ "$(uname -s)" != Linux ] || echo "make venv: no CPU build of $torch on offer for this Python, taking the plain one (some GB)"
else
    fail_with_log "installing $torch+cpu failed"
fi
# The GPU lock as a constraint pins the CUDA libraries that a plain torch pulls in.
pip_install -r "$lock" -c requirements/lock-gpu.txt "$torch" || fail_with_log "installing from $lock failed"

cp "$lock" "$stamp"
echo "make venv: .venv is built, $(($(date +%s) - started)) s"
