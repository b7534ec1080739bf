"""The library of an ARM level, run by an emulator: what ``load_library`` returns, on any machine.

Tests in a process with ``CHUNKLLAMA_TEST_ARM`` see the levels of 64-bit ARM, and the backend runs
them here. The kernels are cross-compiled and linked with ``calls.cpp``. For each call the memory
that its arguments lead to is copied there and back: the storages of tensors, arrays and structures
that contain the addresses.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import gc
import inspect
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from chunkllama.backends.cpu import abi, build
from chunkllama.backends.cpu import backend as native
from chunkllama.resources import data_folder

COMPILER: Final = "aarch64-linux-gnu-g++"
EMULATORS: Final = ("qemu-aarch64-static", "qemu-aarch64")
FUNCTIONS: Final = tuple(abi._SIGNATURES)


def missing() -> str:
    """What is not installed; empty if the levels can be run here."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} (package g++-aarch64-linux-gnu)"
    return "" if emulator() else f"{EMULATORS[0]} (package qemu-user-static)"


def emulator() -> str | None:
    """The emulator's path."""
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def install(patch: pytest.MonkeyPatch) -> None:
    """Make the ARM levels those of this machine."""
    levels = tuple(level for level in build.LEVELS if level.machine == "aarch64")
    for module in (build, native):
        patch.setattr(module, "available_levels", lambda: levels)
        patch.setattr(module, "known_levels", lambda: levels)
    for module in (abi, native):
        patch.setattr(module, "load_library", lambda level, sanitizer="": load(level.name))


@functools.cache
def load(name: str) -> ArmLibrary:
    """The library of a level, which lives as long as this process."""
    return ArmLibrary(next(level for level in build.LEVELS if level.name == name))


def compile_program(level: build.IsaLevel, folder: Path) -> Path:
    """The kernels of a level and ``calls.cpp`` as one static program."""
    names = "".join(f"FUNCTION({name})\n" for name in FUNCTIONS)
    (folder / "functions.inc").write_text(names)
    sources = [*(data_folder("kernels") / "cpu").glob("*.cpp"), Path(__file__).parent / "calls.cpp"]
    flags = [*build.COMMON_FLAGS, *level.flags, f"-I{folder}"]
    jobs = [
        subprocess.Popen(
            [COMPILER, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        )
        for source in sources
    ]
    codes = [job.wait() for job in jobs]
    assert codes == [0] * len(jobs), f"{level.name} does not compile"
    program = folder / level.name
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run([COMPILER, "-static", "-fopenmp", "-o", program, *objects], check=True)
    return program


class ArmLibrary:
    """Functions of the kernels as attributes, called in an emulated process."""

    def __init__(self, level: build.IsaLevel) -> None:
        self._folder = tempfile.TemporaryDirectory()
        program = compile_program(level, Path(self._folder.name))
        path = emulator()
        assert path is not None
        self._process = subprocess.Popen(
            [path, "-cpu", "max", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": ""},
        )

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> int:
        result_type, types = abi._SIGNATURES[name]
        caller = inspect.currentframe()
        assert caller is not None and len(arguments) == len(types)
        image = Image(Memory(caller.f_back))
        places = [image.argument(x, kind) for x, kind in zip(arguments, types, strict=True)]
        request = image.request(FUNCTIONS.index(name), places)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(request)
        stdin.flush()
        (result,) = struct.unpack("q", stdout.read(8))
        for owner in image.owners:
            owner.write(stdout.read(owner.size))
        if result_type is None:
            return 0
        size = ctypes.sizeof(result_type) * 8
        return int(result) & (1 << size - 1) - 1


class Owner:
    """A contiguous piece of this process's memory, and what keeps it alive."""

    def __init__(self, address: int, size: int, keeper: object) -> None:
        self.address, self.size, self.keeper = address, size, keeper

    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def write(self, data: bytes) -> None:
        """Structures hold pointers and stay as they are."""
        if len(data) != self.size:
            raise RuntimeError("the emulated process has ended")
        if isinstance(self.keeper, torch.Tensor | np.ndarray):
            ctypes.memmove(self.address, data, self.size)


class Memory:
    """What an address may belong to: tensors and structures that live, arrays of the callers."""

    def __init__(self, frame: Any) -> None:
        owners = list(_living())
        for _ in range(4):
            if frame is not None:
                arrays = (x for x in frame.f_locals.values() if type(x) is np.ndarray)
                owners += [Owner(x.ctypes.data, x.nbytes, x) for x in arrays]
                frame = frame.f_back
        owners = [owner for owner in owners if owner.address and owner.size]
        # Of those that begin together the largest comes first, and hides the others.
        owners.sort(key=lambda owner: (owner.address, -owner.size))
        self._owners: list[Owner] = []
        for owner in owners:
            last = self._owners[-1] if self._owners else None
            if last is None or owner.address + owner.size > last.address + last.size:
                self._owners.append(owner)
        self._addresses = [owner.address for owner in self._owners]

    def owner(self, address: int) -> Owner:
        at = bisect.bisect_right(self._addresses, address) - 1
        found = self._owners[at]
        assert at >= 0 and address <= found.address + found.size, f"{address:#x} belongs to nothing"
        return found


def _living() -> Iterator[Owner]:
    for each in gc.get_objects():
        kind = type(each)
        if issubclass(kind, torch.Tensor):
            storage = each.untyped_storage()
            yield Owner(storage.data_ptr(), storage.nbytes(), each)
        elif issubclass(kind, ctypes.Structure | ctypes.Array):
            yield Owner(ctypes.addressof(each), ctypes.sizeof(each), each)


class Image:
    """The memory of one call: buffers, the pointers in them, the arguments."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._numbers: dict[int, int] = {}  # address of an owner -> number of its buffer
        self._pointers: list[tuple[int, int, int, int]] = []
        self.owners: list[Owner] = []

    def argument(self, value: Any, kind: Any) -> tuple[int, int]:
        """Buffer and offset of an address; -1 and the value of anything else."""
        referenced = getattr(value, "_obj", None)  # byref
        if referenced is not None:
            return self._place(ctypes.addressof(referenced))
        if isinstance(value, ctypes.Array):
            return self._place(ctypes.addressof(value))
        if isinstance(value, bytes):
            raise TypeError("strings are not sent")
        number = int(value or 0)
        return self._place(number) if kind is ctypes.c_void_p and number else (-1, number)

    def _place(self, address: int) -> tuple[int, int]:
        owner = self._memory.owner(address)
        number = self._numbers.get(owner.address)
        if number is None:
            number = self._numbers[owner.address] = len(self.owners)
            self.owners.append(owner)
            if not isinstance(owner.keeper, torch.Tensor | np.ndarray):
                for offset in _pointers_in(type(owner.keeper), 0):
                    target = ctypes.c_void_p.from_address(owner.address + offset).value
                    if target:
                        self._pointers.append((number, offset, *self._place(target)))
        return number, address - owner.address

    def request(self, function: int, places: list[tuple[int, int]]) -> bytes:
        parts = [struct.pack("2q", function, len(self.owners))]
        for owner in self.owners:
            parts += [struct.pack("q", owner.size), owner.bytes()]
        for rows in (self._pointers, places):
            parts.append(struct.pack("q", len(rows)))
            parts += [struct.pack(f"{len(row)}q", *row) for row in rows]
        return b"".join(parts)


def _pointers_in(kind: Any, offset: int) -> Iterator[int]:
    """Offsets of the pointers in a structure or an array."""
    if issubclass(kind, ctypes.Structure):
        for base in reversed(kind.__mro__):
            for name, field, *_ in base.__dict__.get("_fields_", ()):
                yield from _pointers_in(field, offset + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers_in(kind._type_, offset + i * ctypes.sizeof(kind._type_))
    elif kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer):
        yield offset
