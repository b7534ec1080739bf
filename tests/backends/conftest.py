"""Makes the emulator and NVRTC importable from the op tests and runs its suites on every machine;
prints the compile gate's rows; runs native tests on every level."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkllama.backends.cpu import build

for folder in ("emulation", "arm", "amx"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # gpu_suite
if os.environ.get("CHUNKLLAMA_TEST_ARM"):  # for this whole process: test_native_arm.py
    import arm_library

    arm_library.install(pytest.MonkeyPatch())

    def pytest_collection_finish() -> None:
        gc.freeze()  # arm_library looks through what tests create, not through all modules


if os.environ.get("CHUNKLLAMA_TEST_AMX"):  # likewise: test_native_amx.py
    import amx_library

    amx_library.install(pytest.MonkeyPatch())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the emulator's suites on C++ and on PTX; full matrices on C++ alone."""
    from machines import MACHINES, SUITES

    if metafunc.module.__name__.rpartition(".")[2] in SUITES:
        matrix = "full_matrix" in metafunc.function.__name__
        names = ["cpp"] if matrix else list(MACHINES)
        metafunc.parametrize("machine", names, indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    from machines import IN_CI

    machine = getattr(item, "callspec", None) and item.callspec.params.get("machine", "cpp")
    if machine not in (None, "cpp") and item.name not in IN_CI:
        item.add_marker("nightly")


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of what executes the kernels of launchers that the test makes."""
    from kernel_emulator import MACHINE
    from machines import MACHINES

    name = getattr(request, "param", "cpp")
    token = MACHINE.set(MACHINES[name])
    yield name
    MACHINE.reset(token)


@pytest.fixture(scope="module", params=[level.name for level in build.known_levels()])
def level(request: pytest.FixtureRequest) -> str:
    """Each instruction-set level of this kind of machine that its CPU has."""
    if request.param not in {level.name for level in build.available_levels()}:
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
