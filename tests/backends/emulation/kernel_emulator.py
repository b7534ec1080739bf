"""Run CUDA kernels on the CPU behind the launcher, on one of two machines.

The C++ machine is kernels/emulation, built with g++ from the kernels' C++; ptx_emulator.py has the
other, which executes the PTX that NVRTC makes of the kernels. Libraries are cached in the user's
cache folder by the hash of their sources; those of C++ are one per head_dim and dtype, so that a
build takes seconds and two run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from chunkllama.backends.cuda.launch import Grid
from chunkllama.backends.cuda.source import (
    DTYPES,
    HEAD_DIMS,
    HardwareTable,
    KernelSpec,
    conformance_kernel,
    copy_chunks_kernel,
    draw_tokens_kernel,
    hardware_tables,
    merge_kernel,
    rms_norm_kernel,
    rope_append_kernel,
    silu_and_mul_kernel,
)
from chunkllama.resources import data_folder

FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
HIDDEN = ("-fvisibility=hidden", "-fno-gnu-unique")  # libraries must not share the fibers' globals

KernelGroup = tuple[str, int]  # dtype, head_dim


class Counters(ctypes.Structure):
    """What the emulator counts; the order of ``emulation::Counters``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "mma",
            "ldmatrix",
            "bank_conflicts",
            "copied_bytes",
            "loaded_bytes",
            "stored_bytes",
            "barriers",
            "switches",
        )
    ]


def kernels_of(
    group: KernelGroup, tables: tuple[HardwareTable, ...], *, bounded: bool = False
) -> list[KernelSpec]:
    """Every kernel that a dtype and head_dim can need, for the tiles of all tables; the tiles for
    windows and soft caps only if ``bounded``.
    """
    dtype, head_dim = group
    tiles = {tile.kernel(dtype).expression: tile for t in tables for tile in t.tiles[head_dim]}
    return [
        *(tile.kernel(dtype) for tile in tiles.values()),
        *(tile.kernel(dtype, bounded=True) for tile in tiles.values() if bounded),
        merge_kernel(dtype, head_dim),
        rope_append_kernel(dtype, head_dim),
        rms_norm_kernel(dtype),
        silu_and_mul_kernel(dtype),
        copy_chunks_kernel(),
        draw_tokens_kernel(),
        conformance_kernel(dtype),
    ]


def require_compiler() -> None:
    """Skip, with the reason, where the emulator cannot be built."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the emulator's fibers are written for x86-64, not {platform.machine()}")
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")


def build(
    kernels: list[KernelSpec], *flags: str, sources: Path | None = None, folder: Path | None = None
) -> Path:
    """The library of these kernels.

    Args:
        flags: compiler flags beside ``FLAGS`` (sanitizers).
        sources: another ``kernels`` folder (with a planted bug).
        folder: where to put it; the user's cache by default.
    """
    sources = sources or data_folder("kernels")
    lines = [f"EMULATE({kernel.params}, {kernel.expression})\n" for kernel in kernels]
    texts = sorted(
        [
            *sources.glob("cuda/*.cuh"),
            *sources.glob("emulation/*.h"),
            *sources.glob("emulation/*.cpp"),
        ]
    )
    digest = hashlib.sha256(repr((lines, FLAGS, HIDDEN, flags)).encode())
    for path in texts:
        digest.update(path.read_bytes())
    folder = folder or cache_folder()
    library = folder / f"{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        instantiations = Path(scratch) / "instantiations.inc"
        instantiations.write_text("".join(lines))
        built = Path(scratch) / "emulation.so"
        command = [
            "g++",
            *FLAGS,
            *HIDDEN,
            *flags,
            f'-DINSTANTIATIONS="{instantiations}"',
            "-o",
            str(built),
            str(sources / "emulation" / "host.cpp"),
        ]
        subprocess.run(command, check=True)
        built.replace(library)
    return library


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "chunkllama" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def shipped_libraries() -> dict[KernelGroup, Path]:
    """The libraries of every dtype and head_dim; two builds side by side."""
    require_compiler()
    groups = [(dtype, head_dim) for head_dim in HEAD_DIMS for dtype in DTYPES]
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda group: build(kernels_of(group, hardware_tables())), groups)
        return dict(zip(groups, built, strict=True))


@functools.cache
def bounded_library(dtype: str, head_dim: int, arch: str) -> Path:
    """The library of one table's kernels, those for windows and soft caps included."""
    require_compiler()
    return build(kernels_of((dtype, head_dim), (table(arch),), bounded=True))


class Machine(Protocol):
    """What executes kernels; ``name`` is part of the ids of tests."""

    name: str

    def library(self, kernel: KernelSpec, table: HardwareTable) -> Path:
        """A library whose ``emulate`` runs this kernel; built if it is not in the cache."""
        ...


class PlainMachine:
    """The kernels' C++ against kernels/emulation/device.h."""

    name = "cpp"

    def library(self, kernel: KernelSpec, table: HardwareTable) -> Path:
        dtype = re.search("bf16|fp16", kernel.expression)
        head_dim = re.search(r"(?:bf16|fp16), (\d+)", kernel.expression)
        group = (dtype[0] if dtype else "bf16", int(head_dim[1]) if head_dim else 64)
        if kernel.expression.endswith("true>>"):
            return bounded_library(*group, table.arch)
        return shipped_libraries()[group]


# The machine of new launchers: tests/backends/conftest.py sets it for a test.
MACHINE: ContextVar[Machine] = ContextVar("machine", default=PlainMachine())  # noqa: B039


@dataclass
class EmulatedLauncher:
    """Implements ``backends.cuda.launch.Launcher`` on the CPU.

    Attributes:
        table: tiles and packing; ``num_sms`` of them are pretended.
        schedule: order of threads: 0 forward, 1 reverse, others seed a shuffle.
        machine: what executes the kernels.
        counters: what all launches so far have added up to.
        launched: kernels, grids and parameters in order.
        prepared: kernels that were to be compiled before.
    """

    table: HardwareTable
    num_sms: int = 4
    schedule: int = 0
    machine: Machine = field(default_factory=MACHINE.get)
    counters: Counters = field(default_factory=Counters)
    launched: list[tuple[KernelSpec, Grid, bytes]] = field(default_factory=list)
    prepared: list[KernelSpec] = field(default_factory=list)

    def prepare(self, kernels: list[KernelSpec]) -> None:
        self.prepared += kernels

    def launch(self, kernel: KernelSpec, grid: Grid, params: bytes) -> None:
        self.launched.append((kernel, grid, params))
        status = load(self.machine.library(kernel, self.table)).emulate(
            kernel.expression.encode(),
            (ctypes.c_uint * 3)(*grid),
            kernel.threads,
            ctypes.c_size_t(kernel.shared_bytes),
            params,
            ctypes.c_size_t(len(params)),
            self.schedule,
            ctypes.byref(self.counters),
        )
        assert status == 0, f"{kernel.expression}: emulate returned {status}"


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def table(arch: str) -> HardwareTable:
    return next(t for t in hardware_tables() if t.arch == arch)
