"""Makes the emulator and NVRTC importable from the op tests; prints the compile gate's rows; runs
native tests on every level."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # gpu_suite


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def level(request: pytest.FixtureRequest) -> str:
    """Each instruction-set level that this CPU has."""
    from chunkllama.backends.cpu.build import available_levels

    if request.param not in {level.name for level in available_levels()}:
        pytest.skip(f"not run: this CPU has no {request.param}")
    return str(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [
        row
        for report in reports
        for name, row in getattr(report, "user_properties", ())
        if name == "compile gate"
    ]
    if rows:
        terminalreporter.section("compile gate")
        for row in rows:
            terminalreporter.line(row)
