#!/bin/sh
# For the Dockerfile: removes 0.25 GB of the installed packages that only compiling against torch, and
# testing the packages, needs. torch refuses to be imported without torch_shm_manager.
set -eu
cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm -rf torch/include torch/test
find torch/bin -type f ! -name torch_shm_manager -delete
find . -type d -name tests -prune -exec rm -rf {} +
