"""On a machine with a GPU: everything `benchmarks/gpu.py check` asks of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
def test_every_check_passes_on_this_gpu() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "check", "--fresh"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
