"""The native ops' own tests once more, on level ``amx`` with tile instructions in C++."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import amx_library
import pytest

HERE = Path(__file__).parent


@pytest.mark.nightly
def test_native_ops_on_emulated_tiles(child_environment: dict[str, str]) -> None:
    """Attention over every type of K/V, linears of every type, and whole models."""
    if missing := amx_library.missing():
        pytest.skip(f"not run: this CPU has no {missing}")
    names = ("ops", "model", "quantized", "adapters", "int8_kv", "deterministic")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "amx"),
            *(str(HERE / f"test_native_{name}.py") for name in names),
        ],
        env={**child_environment, "CHUNKLLAMA_TEST_AMX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
