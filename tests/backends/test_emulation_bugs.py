"""What the emulator's machines notice: bugs planted in copies of the sources, each with the tool to
catch it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_bugs import BUGS, PTX_BUGS, SANITIZERS, is_clean, library, measured, notices, run

MACHINES = ["cpp", pytest.param("ptx", marks=pytest.mark.nightly)]


@pytest.mark.parametrize("schedule", [0, 1, 5])
@pytest.mark.parametrize("executed", MACHINES)
def test_emulation_case_without_a_bug_is_clean(
    executed: str, schedule: int, tmp_path: Path
) -> None:
    result = measured(run(library(tmp_path, None, machine=executed), schedule))
    assert is_clean(result), result


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", [0, 1, 5])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("executed", ["cpp", "ptx"])
def test_emulation_sanitizer_is_clean(
    executed: str, sanitizer: str, schedule: int, tmp_path: Path
) -> None:
    result = measured(run(library(tmp_path, None, sanitizer, executed), schedule, sanitizer))
    assert is_clean(result), result


@pytest.mark.parametrize("name", [n for n, bug in BUGS.items() if bug.tool not in SANITIZERS])
@pytest.mark.parametrize("executed", MACHINES)
def test_emulation_catches_planted_bug(executed: str, name: str, tmp_path: Path) -> None:
    """Bugs that the plain emulator notices, by numbers, counters or its own lints."""
    bug = BUGS[name]
    notices(run(library(tmp_path, bug, machine=executed), schedule=0), bug, bug.message)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n, bug in BUGS.items() if bug.tool in SANITIZERS])
@pytest.mark.parametrize("executed", ["cpp", "ptx"])
def test_emulation_sanitizer_catches_planted_bug(executed: str, name: str, tmp_path: Path) -> None:
    """Bugs that need ASan or TSan: most of them give the right numbers under every schedule."""
    bug = BUGS[name]
    message = (executed == "ptx" and bug.on_ptx) or bug.message
    sanitizer = None if message == bug.on_ptx else bug.tool
    process = run(library(tmp_path, bug, sanitizer, executed), schedule=0, sanitizer=sanitizer)
    notices(process, bug, message)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PTX_BUGS)
def test_emulation_of_ptx_catches_planted_bug(name: str, tmp_path: Path) -> None:
    """Bugs in what the C++ machine replaces: inline PTX and the struct's layout."""
    bug = PTX_BUGS[name]
    notices(run(library(tmp_path, bug, machine="ptx"), schedule=0), bug, bug.message)
