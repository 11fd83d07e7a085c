# Sourced by the other scripts: finds Python, makes .venv (or $EDGEDISTILL_VENV), installs the pinned versions into it.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EDGEDISTILL_VENV:-$root/.venv}

die() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  try: %s\n' "$2" >&2
    exit 1
}

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    die "Python 3.11 or newer is not on PATH" "apt-get install -y python3 python3-venv (Debian 12, Ubuntu 24.04 or newer), or set PYTHON"
}

make_venv() {
    [ -x "$venv/bin/python" ] && return
    local python
    python=$(find_python) || exit 1
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments" "apt-get install -y python3-venv"
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
}

# provide EXTRAS: installs this checkout with them, unless pyproject.toml, the pins and the extras are those of last time.
# Editable, so that a newer checkout needs no new install.
provide() {
    local extras=$1 started=$SECONDS
    installed "$extras" && return
    make_venv
    "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null || command -v c++ >/dev/null || command -v g++ >/dev/null ||
        die "no C++ compiler: llama.cpp is compiled during the install" "apt-get install -y g++"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25"
    # First and alone: an index that has torch's CPU build under this version serves that one. Every other request for
    # torch may be answered with gigabytes of CUDA packages.
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/scripts/constraints.txt" torch==2.13.0
    without_amx
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/scripts/constraints.txt" -e "${root}[$extras]"
    replace_amx
    "$venv/bin/python" -m compileall -q "$root/edgedistill"  # pip does not for an editable install
    fingerprint >"$venv/installed-$extras"
    echo "installed in $((SECONDS - started)) s" >&2
}

# GCC 12's _tile_loadconfig lets the stores of all but the first bytes of its configuration go: on servers with AMX llama.cpp
# then faults in its first product with a quantized matrix. No phone or laptop has AMX, so nothing is lost.
without_amx() {
    grep -qw amx_tile /proc/cpuinfo 2>/dev/null || return 0
    export CFLAGS="${CFLAGS:-} -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    export CXXFLAGS="${CXXFLAGS:-} -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
}

# pip may have had a wheel in its cache that was compiled before, with AMX: the flags are no part of what it looks for.
replace_amx() {
    "$venv/bin/python" -c '
import sys, llama_cpp
sys.exit(b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info())' 2>/dev/null || return 0
    echo "compiling llama.cpp again: the wheel in pip's cache uses AMX, which GCC 12 sets up wrong" >&2
    "$venv/bin/python" -m pip cache remove --disable-pip-version-check llama_cpp_python >/dev/null || true
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/scripts/constraints.txt" \
        --force-reinstall --no-deps llama-cpp-python
}

installed() {
    [ "$(cat "$venv/installed-$1" 2>/dev/null)" = "$(fingerprint)" ]
}

fingerprint() {
    cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum
}
