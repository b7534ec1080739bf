"""The native ops' own tests once more, on the levels of 64-bit ARM, which an emulator runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import arm_library
import pytest

from chunkllama.backends.cpu.build import LEVELS

HERE = Path(__file__).parent
ARM_LEVELS = [level.name for level in LEVELS if level.machine == "aarch64"]


@pytest.mark.nightly
@pytest.mark.parametrize("level", ARM_LEVELS)
def test_native_ops_on(level: str, child_environment: dict[str, str]) -> None:
    """Attention, linears of every type, elementwise ops and whole models."""
    if missing := arm_library.missing():
        pytest.skip(f"not run: there is no {missing}")
    longer = [name for name in ARM_LEVELS if name != level and level in name]
    chosen = " and not ".join([level, *longer])
    names = ("ops", "model", "quantized", "adapters", "int8_kv", "kivi")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen),
            *(str(HERE / f"test_native_{name}.py") for name in names),
        ],
        env={**child_environment, "CHUNKLLAMA_TEST_ARM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
