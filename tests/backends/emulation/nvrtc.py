"""NVRTC through ctypes: compiles kernels for any architecture, with no driver, CuPy or header."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from chunkllama.backends.cuda.source import COMPILE_OPTIONS, KernelSpec, cuda_source

# What CuPy adds to every RawModule, and ptxas' report of resources.
OPTIONS = (
    *COMPILE_OPTIONS,
    "--device-as-default-execution-space",
    "-ftz=true",
    "--ptxas-options=-v",
)


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel."""

    registers: int
    stack_bytes: int
    spilled_bytes: int


def library_path() -> Path | None:
    """libnvrtc of the nvidia-cuda-nvrtc wheel, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [
        path
        for folder in folders or ()
        for path in Path(folder).rglob("libnvrtc.so.*")
        if "alt" not in path.name
    ]
    return max(found, default=None)


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    assert path is not None
    return ctypes.CDLL(str(path))


def compile_kernels(arch: str, kernels: list[KernelSpec]) -> dict[KernelSpec, Resources]:
    """Compile kernels of one file for ``arch``; raise RuntimeError with the log on errors."""
    nvrtc, program = _library(), ctypes.c_void_p()
    source = cuda_source(kernels[0].file_name).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
    try:
        for kernel in kernels:
            assert nvrtc.nvrtcAddNameExpression(program, kernel.expression.encode()) == 0
        options = [option.encode() for option in (f"-arch={arch}", *OPTIONS)]
        status = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if status:
            raise RuntimeError(log.value.decode())
        reports = _reports(log.value.decode())
        return {kernel: reports[_lowered_name(nvrtc, program, kernel)] for kernel in kernels}
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _lowered_name(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, kernel: KernelSpec) -> str:
    name = ctypes.c_char_p()
    status = nvrtc.nvrtcGetLoweredName(program, kernel.expression.encode(), ctypes.byref(name))
    assert status == 0 and name.value is not None, kernel.expression
    return name.value.decode()


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
