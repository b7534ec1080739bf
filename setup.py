"""Compile the CPU kernels into the wheel.

Everything else is in pyproject.toml. The wheel is for the machine that the C++ compiler compiles
for: ``CXX=aarch64-linux-gnu-g++`` makes one for 64-bit ARM. Without a compiler, for another
processor, or with ``CHUNKLLAMA_SHIP_NATIVE=0`` the wheel holds the sources only, and runs on any
platform.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chunkllama.backends.cpu.build import (
    NativeBuildError,
    compile_shipped,
    compiler_target,
    find_compiler,
)

_FOLDER = Path("chunkllama", "_native")
_OLDEST_GLIBC = (2, 17)  # of the first Linux platform tag that names a glibc


def objdump() -> str:
    """Return the program that reads what the compiler writes: a cross compiler has its own."""
    own = "-".join([*compiler_target(find_compiler()), "objdump"])
    return own if shutil.which(own) else "objdump"


def can_compile() -> bool:
    """Return whether the compiler makes what the wheel's platform tag promises."""
    machine, system = compiler_target(find_compiler())
    return (
        os.environ.get("CHUNKLLAMA_SHIP_NATIVE") != "0"
        and machine in ("x86_64", "aarch64")
        and "linux" in system
        and "musl" not in system  # the tag names a version of glibc
        and shutil.which(objdump()) is not None
    )


def newest_glibc(library: Path) -> tuple[int, int]:
    """Return the newest version of glibc whose symbols a library uses."""
    listing = subprocess.run(
        [objdump(), "-T", str(library)], check=True, capture_output=True, text=True
    ).stdout
    found = re.findall(r"\(?GLIBC_(\d+)\.(\d+)", listing)
    return max((int(major), int(minor)) for major, minor in found)


class BuildPython(build_py):
    """Copy the packages, and compile the kernels beside them unless the install is editable."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / _FOLDER
        if self.editable_mode:
            return
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build with other sources
        if not can_compile():
            return
        try:
            compile_shipped(folder)
        except NativeBuildError as error:
            shutil.rmtree(folder)
            print(f"the wheel holds no compiled kernels: {error}", file=sys.stderr)


class BuildWheel(bdist_wheel):
    """Tag a wheel with compiled kernels by the processor and the oldest glibc that it runs on."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform); the kernels are called through ctypes, by any Python."""
        folder = Path(self.get_finalized_command("build_py").build_lib) / _FOLDER
        libraries = list(folder.glob("*.so"))
        if not libraries:
            return "py3", "none", "any"
        major, minor = max(_OLDEST_GLIBC, *map(newest_glibc, libraries))
        machine, _ = compiler_target(find_compiler())
        return "py3", "none", f"manylinux_{major}_{minor}_{machine}"


setup(cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel})
