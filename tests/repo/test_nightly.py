"""The nightly run's status."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "nightly.sh"


@pytest.mark.parametrize(
    ("together", "alone", "status"), [(0, 5, 0), (5, 0, 0), (0, 0, 0), (5, 5, 5), (1, 5, 1)]
)
def test_a_run_that_collects_nothing_fails(tmp_path, together, alone, status) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *"not alone"*) exit {together} ;; *"and alone"*) exit {alone} ;; esac\n'
    )
    python.chmod(0o755)
    ran = subprocess.run(
        ["sh", SCRIPT, python, "1", "tests/none.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == status
    assert ("no test was collected" in ran.stderr) is (status == 5)
