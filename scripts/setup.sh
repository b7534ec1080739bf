#!/bin/sh
# Create the virtual environment and install into it: "serving" what a server and the examples need,
# "everything" the tools that check the code too. Packages are pinned by requirements/*.txt.
set -eu
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "chunkllama needs Python 3.11 or newer, and '$PYTHON' is not; try: make PYTHON=python3.12 serve" >&2
    exit 2
}
case "${1:-everything}" in
serving) layers="serving examples" ;;
everything) layers="serving examples tools" ;;
*) echo "setup.sh: $1 is neither serving nor everything" >&2 && exit 2 ;;
esac
# Check pip: an interrupted creation leaves a python without it.
"$VENV/bin/python" -m pip --version > /dev/null 2>&1 || {
    say "creating $VENV"
    "$PYTHON" -m venv "$VENV"
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pinned() {
    for layer in "$@"; do
        say "installing requirements/$layer.txt"
        pip install --no-deps --require-hashes -r "requirements/$layer.txt"
    done
}
has_gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ]; }
# The CUDA major of torch's build; nothing for a build without CUDA.
cuda_major() { "$VENV/bin/python" -c 'import torch; print((torch.version.cuda or "").split(".")[0])'; }

DEFAULT_TORCH="torch==2.13.0"
CPU_TORCH="$DEFAULT_TORCH+cpu"
if [ -n "${TORCH:-}" ]; then
    say "installing the requested torch: $TORCH"
    # shellcheck disable=SC2086  # TORCH may hold several words: options and a requirement
    pip install $TORCH
elif "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    say "torch is already installed"
elif has_gpu; then
    say "found an NVIDIA device: installing torch's default (CUDA) build"
    pinned cu13
elif pip install "$CPU_TORCH" 2> /dev/null; then
    say "no NVIDIA device: installed torch's CPU build ($CPU_TORCH)"
else
    say "no NVIDIA device, but pip finds no CPU build of torch: installing the default build (on Linux several GB)."
    say "to avoid that: make setup TORCH=\"torch --index-url URL-OF-PYTORCH'S-CPU-WHEELS\""
    pip install "$DEFAULT_TORCH"
fi

# shellcheck disable=SC2086  # several words
pinned $layers
say "installing chunkllama"
pip install --no-deps -e .
major=$(cuda_major)
if has_gpu && [ -n "$major" ] && ! "$VENV/bin/python" -c 'import cupy' 2>/dev/null; then
    say "torch has CUDA $major: installing chunkllama[cu$major]"
    pip install -e ".[cu$major]"
fi
say "compiling the CPU kernels"
"$VENV/bin/python" -m chunkllama.backends.cpu.backend || {
    [ "${1:-everything}" = serving ] || exit 1
    say "the server computes in torch, much slower, until a start finds a compiler: install g++ or set CXX"
}
