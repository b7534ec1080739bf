"""Run what NVRTC emits on the CPU: the kernels' PTX, translated to C++ and built with g++.

The second machine of kernel_emulator.py: the C++ machine shows that the kernels' C++ is right,
this one that their inline PTX and what the compiler makes of the rest are.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from kernel_emulator import cache_folder, load, require_compiler
from nvrtc import OPTIONS, compiled_program, library_path
from ptx_translator import translate

from chunkllama.backends.cuda.source import HardwareTable, KernelSpec, cuda_source
from chunkllama.resources import data_folder

# No warnings: registers and labels of the PTX are often unused.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-w", "-fvisibility=hidden")
FLAGS += ("-fno-gnu-unique",)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class PtxMachine:
    """Executes the PTX of a virtual architecture.

    Attributes:
        name: part of the ids of tests.
        arch: ``compute_*``.
        approximate_units: relative error of ex2, lg2 and rsqrt in units of 2^-23.
        truncating_mma: tensor cores that align to the largest term and truncate.
        flags: compiler flags (coverage).
    """

    name: str
    arch: str
    approximate_units: int = 0
    truncating_mma: bool = False
    flags: tuple[str, ...] = ()

    def library(self, kernel: KernelSpec, table: HardwareTable) -> Path:
        """The library of this kernel alone."""
        library = _shipped(kernel, self.arch, self.flags)
        load(library).set_arithmetic(self.approximate_units, int(self.truncating_mma))
        return library


def require_nvrtc() -> None:
    """Skip, with the reason, where the PTX emulator cannot be built."""
    require_compiler()
    if library_path() is None:
        pytest.skip("the nvidia-cuda-nvrtc-cu12 wheel is not installed (extra dev)")


@functools.cache
def _shipped(kernel: KernelSpec, arch: str, flags: tuple[str, ...]) -> Path:
    require_nvrtc()
    return build_ptx([kernel], *flags, arch=arch)


def build_ptx(
    kernels: list[KernelSpec],
    *flags: str,
    arch: str = "compute_90",
    sources: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """The library of these kernels' PTX; the PTX is kept beside it, for the lines in reports.

    Args:
        flags: compiler flags beside ``FLAGS`` (sanitizers).
        sources: another ``kernels`` folder (with a planted bug).
        folder: where to put it; the user's cache by default.

    Raises:
        RuntimeError: NVRTC finds errors.
        UnsupportedPtx: the translator lacks something.
    """
    sources = sources or data_folder("kernels")
    fibers = sources / "emulation"
    files: dict[str, list[KernelSpec]] = {}
    for kernel in kernels:
        files.setdefault(kernel.file_name, []).append(kernel)
    nvrtc = library_path()
    assert nvrtc is not None
    names = [kernel.expression for kernel in kernels]
    digest = hashlib.sha256(repr((names, arch, OPTIONS, FLAGS, flags)).encode())
    digest.update(repr((str(nvrtc), nvrtc.stat().st_size)).encode())
    for path in (*sorted(HERE.glob("ptx_*")), fibers / "fibers.h"):
        digest.update(path.read_bytes())
    for name in files:
        digest.update(cuda_source(name, sources).encode())
    folder = folder or cache_folder()
    library = folder / f"ptx-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        texts = {Path(name).stem: ptx_of(kernels, arch, sources) for name, kernels in files.items()}
        compile_ptx(library, texts, *flags, fibers=fibers)
    return library


def compile_ptx(
    library: Path, texts: dict[str, tuple[str, dict[str, str]]], *flags: str, fibers: Path
) -> None:
    """Translate PTX and build it.

    Args:
        library: the file to write.
        texts: by name, PTX and the lowered names of its kernels by expression.
        fibers: the folder of fibers.h.
    """
    translated, table = [], []
    for name, (text, names) in texts.items():
        kept = library.with_name(f"{library.stem}-{name}.ptx")
        kept.write_text(text)
        for entry in translate(text, names):
            translated.append(f'#line 1 "{kept}"\n{entry.code}')
            table.append(
                f'KERNEL_OF("{entry.expression}", {entry.function}, {entry.param_bytes}, '
                f"{entry.max_threads})\n"
            )
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        root = Path(scratch)
        (root / "translated.inc").write_text("\n".join(translated))
        (root / "table.inc").write_text("".join(table))
        command = ["g++", *FLAGS, *flags, "-I", str(fibers)]
        command += [f'-DTRANSLATED="{root}/translated.inc"', f'-DTABLE="{root}/table.inc"']
        command += ["-o", str(root / "built.so"), str(HERE / "ptx_host.cpp")]
        subprocess.run(command, check=True)
        (root / "built.so").replace(library)


def ptx_of(
    kernels: list[KernelSpec], arch: str, sources: Path | None = None
) -> tuple[str, dict[str, str]]:
    """The PTX of kernels of one file, and their lowered names by expression."""
    with compiled_program(arch, kernels, sources=sources) as program:
        return program.text("PTX"), {k.expression: program.lowered_name(k) for k in kernels}
