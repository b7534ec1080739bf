#!/bin/sh
# Create the virtual environment and install everything, test tools included.
set -eu
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "chunkllama needs Python 3.11 or newer, and '$PYTHON' is not; try: make PYTHON=python3.12 serve" >&2
    exit 2
}
# Check pip: an interrupted creation leaves a python without it.
"$VENV/bin/python" -m pip --version > /dev/null 2>&1 || {
    say "creating $VENV"
    "$PYTHON" -m venv "$VENV"
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

CPU_TORCH="torch==2.13.0+cpu"
if [ -n "${TORCH:-}" ]; then
    say "installing the requested torch: $TORCH"
    # shellcheck disable=SC2086  # TORCH may hold several words: options and a requirement
    pip install $TORCH
elif "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    say "torch is already installed"
elif [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ]; then
    say "found an NVIDIA device: installing torch's default (CUDA) build"
    pip install "torch>=2.11"
elif pip install "$CPU_TORCH" 2> /dev/null; then
    say "no NVIDIA device: installed torch's CPU build ($CPU_TORCH)"
else
    say "no NVIDIA device, but pip finds no CPU build of torch: installing the default build (several GB)."
    say "to avoid that: make setup TORCH=\"torch --index-url URL-OF-PYTORCH'S-CPU-WHEELS\""
    pip install "torch>=2.11"
fi

say "installing chunkllama and its tools"
pip install -e ".[dev]"
say "compiling the CPU kernels"
"$VENV/bin/python" -m chunkllama.backends.cpu.backend
