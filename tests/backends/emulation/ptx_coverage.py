"""A pytest plugin: which lines of the PTX the tests on ``ptx_90`` run.

    CHUNKLLAMA_PTX_COVERAGE=FILE python -m pytest -p ptx_coverage -k ptx_90 ...

writes {kernel's expression: {"ran": [lines], "instructions": [lines]}} as JSON. The folder of this
file must be importable.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from kernel_emulator import load
from machines import MACHINES
from ptx_emulator import PtxMachine
from ptx_text import parse

from chunkllama.backends.cuda.source import HardwareTable, KernelSpec

REPORT = Path(os.environ.pop("CHUNKLLAMA_PTX_COVERAGE"))


@dataclass(frozen=True)
class CoveringMachine(PtxMachine):
    """Keeps the libraries that it has handed out, by kernel."""

    libraries: dict[KernelSpec, Path] = field(default_factory=dict, compare=False)

    def library(self, kernel: KernelSpec, table: HardwareTable) -> Path:
        return self.libraries.setdefault(kernel, super().library(kernel, table))


MACHINE = CoveringMachine("ptx_90", "compute_90", flags=("-DPTX_COVERAGE",))
MACHINES["ptx_90"] = MACHINE


def lines_that_ran(library: Path, kernel: KernelSpec) -> list[int]:
    loaded = load(library)
    loaded.coverage.restype = ctypes.c_size_t
    lines = ctypes.POINTER(ctypes.c_ubyte)()
    count = loaded.coverage(kernel.expression.encode(), ctypes.byref(lines))
    return [line for line in range(count) if lines[line]]


def instructions(library: Path, kernel: KernelSpec) -> list[int]:
    text = library.with_name(f"{library.stem}-{Path(kernel.file_name).stem}.ptx").read_text()
    (entry,) = parse(text)[0]
    return sorted({n for n, x in entry.statements if not x.startswith(".") and x[-1] != ":"})


def pytest_sessionfinish() -> None:
    report = {
        kernel.expression: {
            "ran": lines_that_ran(library, kernel),
            "instructions": instructions(library, kernel),
        }
        for kernel, library in MACHINE.libraries.items()
    }
    REPORT.write_text(json.dumps(report))
