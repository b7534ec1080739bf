"""NVRTC through ctypes: PTX and resources of kernels for any architecture, with no driver, CuPy or
header.

A process loads one major version of NVRTC: libraries of two majors share names of symbols. Run as

    python nvrtc.py MAJOR ARCH

prints what ptxas reports of every shipped kernel and of the conformance kernel as JSON, with the
tile shapes that a device of that architecture runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from chunkllama.backends.cuda.source import (
    COMPILE_OPTIONS,
    DTYPES,
    HardwareTable,
    KernelSpec,
    conformance_kernel,
    cuda_source,
    shipped_kernels,
    table_for,
)

# What CuPy adds to every RawModule.
OPTIONS = (*COMPILE_OPTIONS, "--device-as-default-execution-space", "-ftz=true")
MAJOR = 12  # of the extra dev

# CUDA programming guide, "Technical Specifications per Compute Capability".
SHARED_KIB_PER_BLOCK = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "sm_121": 99,
}


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel."""

    registers: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled program: NVRTC's log and results, valid inside ``compiled_program``."""

    nvrtc: ctypes.CDLL
    handle: ctypes.c_void_p
    kernels: list[KernelSpec]

    def lowered_name(self, kernel: KernelSpec) -> str:
        name = ctypes.c_char_p()
        status = self.nvrtc.nvrtcGetLoweredName(
            self.handle, kernel.expression.encode(), ctypes.byref(name)
        )
        assert status == 0 and name.value is not None, kernel.expression
        return name.value.decode()

    def text(self, what: str) -> str:
        return self.binary(what).rstrip(b"\0").decode()

    def binary(self, what: str) -> bytes:
        """``what``: ProgramLog, PTX or CUBIN."""
        size = ctypes.c_size_t()
        assert getattr(self.nvrtc, f"nvrtcGet{what}Size")(self.handle, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(self.nvrtc, f"nvrtcGet{what}")(self.handle, buffer) == 0
        return buffer.raw


def library_path(major: int = MAJOR) -> Path | None:
    """libnvrtc of the nvidia-cuda-nvrtc wheel of this major version, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = (p for f in folders or () for p in Path(f).rglob(f"libnvrtc.so.{major}"))
    return next(found, None)


@functools.cache
def _library(major: int) -> ctypes.CDLL:
    path = library_path(major)
    assert path is not None, f"no wheel with NVRTC {major}"
    return ctypes.CDLL(str(path))


def table_of(arch: str) -> HardwareTable:
    """The table that a device of an architecture runs."""
    capability = (int(arch[3:-1]), int(arch[-1]))
    return table_for(capability, SHARED_KIB_PER_BLOCK[arch] << 10)


@contextmanager
def compiled_program(
    arch: str,
    kernels: list[KernelSpec],
    *options: str,
    sources: Path | None = None,
    major: int = MAJOR,
) -> Iterator[Program]:
    """Compile kernels of one file for ``arch`` (``sm_*`` or ``compute_*``).

    Args:
        sources: another ``kernels`` folder (with a planted bug).

    Raises:
        RuntimeError: NVRTC's log, if it finds errors.
    """
    nvrtc, handle = _library(major), ctypes.c_void_p()
    (file_name,) = {kernel.file_name for kernel in kernels}
    source = cuda_source(file_name, sources).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(handle), source, b"kernel.cu", 0, None, None) == 0
    try:
        for kernel in kernels:
            assert nvrtc.nvrtcAddNameExpression(handle, kernel.expression.encode()) == 0
        given = [option.encode() for option in (f"-arch={arch}", *OPTIONS, *options)]
        program = Program(nvrtc, handle, kernels)
        if nvrtc.nvrtcCompileProgram(handle, len(given), (ctypes.c_char_p * len(given))(*given)):
            raise RuntimeError(program.text("ProgramLog"))
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


def compile_kernels(
    arch: str, kernels: list[KernelSpec], major: int = MAJOR
) -> dict[KernelSpec, Resources]:
    """Compile kernels of one file for ``arch``; raise RuntimeError with the log on errors."""
    with compiled_program(arch, kernels, "--ptxas-options=-v", major=major) as program:
        reports = _reports(program.text("ProgramLog"))
        return {kernel: reports[program.lowered_name(kernel)] for kernel in kernels}


def _reports(log: str) -> dict[str, Resources]:
    """ptxas' lines per entry function."""
    pattern = re.compile(
        r"entry function '(?P<name>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<spill>\d+) bytes spill stores.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        found["name"]: Resources(int(found["registers"]), int(found["stack"]), int(found["spill"]))
        for found in pattern.finditer(log)
    }


def every_kernel(table: HardwareTable) -> list[KernelSpec]:
    return [*shipped_kernels(table), *(conformance_kernel(dtype) for dtype in DTYPES)]


def main(major: int, arch: str) -> None:
    files: dict[str, list[KernelSpec]] = {}
    for kernel in every_kernel(table_of(arch)):
        files.setdefault(kernel.file_name, []).append(kernel)
    found = {
        kernel.expression: astuple(resources)
        for kernels in files.values()
        for kernel, resources in compile_kernels(arch, kernels, major).items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
