#!/usr/bin/env bash
# Makes .venv in the project's folder where there is none and installs a requirements file into it, once:
#     bash utils/install.sh requirements.txt
# A stamp inside .venv, named after the content of the requirements, lets the next call return at once.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
requirements=$root/$1

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    base=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then base=$candidate; break; fi
    done
    if [ -z "$base" ]; then
        echo "error: Python 3.10 or newer is needed, found $(python3 --version 2>/dev/null || echo none)" >&2
        exit 2
    fi
    echo "making $venv with $("$base" --version)"
    if ! "$base" -m venv --clear "$venv"; then
        echo "error: $base cannot make a virtual environment: install its venv package (python3-venv on Debian)" >&2
        exit 2
    fi
elif ! new_enough "$venv/bin/python"; then
    echo "error: $venv has $("$venv/bin/python" --version), 3.10 or newer is needed: delete it and call again" >&2
    exit 2
fi

# of the folder too: a copy of the project with its .venv would go on importing the original's packages
stamp=$venv/installed-$({ echo "$root"; cat "$root/requirements.txt" "$requirements"; } | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "installing $1 into $venv (a few minutes the first time)"
    cd "$root"   # requirements.txt installs the project itself, as `.`
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore -r "$requirements"
    touch "$stamp"
fi

# where there is a GPU and no compiler that fits the torch just installed: pip's, for the bilateral filter
# (not grep -q, which leaves at the first line: an nvidia-smi that goes on writing would fail)
if [ ! -e "$stamp-nvcc" ] && nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null; then
    cd "$root"
    nvcc=$("$venv/bin/python" -c "from bilateralfilter import _cuda_toolkit; print(_cuda_toolkit.missing())") || nvcc=
    if [ -n "$nvcc" ]; then
        echo "installing nvcc for the bilateral filter: $nvcc"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore "$nvcc" \
            2>/dev/null ||
            echo "warning: nvcc was not installed: the filter runs as slow plain PyTorch on the GPU until" \
                "'$venv/bin/python -m pip install \"$nvcc\"' is done" >&2
    fi
    touch "$stamp-nvcc"
fi
