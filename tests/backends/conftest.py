"""Makes the emulator and NVRTC importable from the op tests; prints the compile gate's rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # gpu_suite


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
