"""The native ops' own tests once more, on libraries built with ASan and UBSan, level by level."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chunkllama.backends.cpu.build import LEVELS, IsaLevel, available_levels, known_levels

HERE = Path(__file__).parent


@pytest.mark.nightly
@pytest.mark.parametrize("level", known_levels(), ids=lambda level: level.name)
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_native_ops_are_clean_under(
    sanitizer: str, level: IsaLevel, child_environment: dict[str, str]
) -> None:
    if level not in available_levels():
        pytest.skip(f"not run: this CPU has no {level.name}")
    environment = {
        **child_environment,
        "CHUNKLLAMA_TEST_SANITIZER": sanitizer,
        "OMP_NUM_THREADS": "2",
    }
    if sanitizer == "address":
        runtime = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        environment["LD_PRELOAD"] = runtime
        # Leaks: the interpreter itself has some at exit.
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
    longer = [each.name for each in LEVELS if each.name != level.name and level.name in each.name]
    chosen = " and not ".join([level.name, *longer])
    names = ("ops", "model", "quantized", "adapters", "int8_kv", "kivi")
    files = [str(HERE / f"test_native_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
