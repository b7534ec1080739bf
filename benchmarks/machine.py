"""Describe the machine a benchmark ran on."""

import itertools
import platform
import re
import sys
import time
from pathlib import Path

import chunkllama


def cpu_name() -> str:
    """Return model name and number of processors, from /proc/cpuinfo."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = Path("/proc/cpuinfo").read_text()
    extra = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return f"{len(names)} x {names[0]} ({', '.join(extra) or 'no AVX512-BF16'})"


def describe_run() -> dict[str, str]:
    """Return the head of a result: command, machine, versions and date."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": cpu_name(),
        "python": platform.python_version(),
        "chunkllama": chunkllama.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def new_result(name: str) -> Path:
    """Return a path in results/ named by benchmark and machine that no earlier run has taken.

    Args:
        name: of the benchmark and of what was chosen to run.
    """
    machine = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower().replace("(r)", "")).strip("-")
    folder = Path(__file__).parent / "results"
    for number in itertools.count(1):
        path = folder / f"{name}-{machine}{'' if number == 1 else f'-{number}'}.json"
        if not path.exists():
            return path
    raise AssertionError("numbers do not end")
