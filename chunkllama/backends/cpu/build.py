"""Find the libraries of ``kernels/cpu``: shipped in the wheel, or compiled once into a cache.

One shared library per instruction-set level with one C ABI; the loader picks the best level the
machine has, so nothing is dispatched inside a kernel. A library's name carries a hash of sources
and flags, and in the cache one of the compiler: a changed source or compiler leads to a new build,
an unchanged one is found again, even without a compiler. Imports the standard library only, because
``setup.py`` compiles with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chunkllama.resources import cache_folder, data_folder

COMMON_FLAGS: Final = (
    *("-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized"),
)
_GCC_FLAGS: Final = ("-fno-gnu-unique", "-Wno-maybe-uninitialized")
_COMPILERS: Final = ("g++", "clang++")
SANITIZERS: Final = ("address", "undefined")
_SHIPPED_FOLDER: Final = Path(__file__).resolve().parents[2] / "_native"


@dataclass(frozen=True, slots=True)
class IsaLevel:
    """An instruction-set level.

    Attributes:
        flags: of the compiler.
        features: of /proc/cpuinfo that it needs.
        machine: as ``platform.machine`` names it; empty for any.
    """

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]
    machine: str = ""


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16")
_AVX512_FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_BF16_FEATURES = _AVX512_FEATURES | {"avx512_bf16", "avx512_vnni"}
# -march=armv8.2-a lets the compiler use all of these.
_ARM_V8_2_FEATURES = frozenset({"asimd", "asimddp", "asimdrdm", "atomics", "crc32"})

# Best first.
LEVELS: Final = (
    IsaLevel(
        "amx",
        (*_AMX, "-mtune=sapphirerapids"),
        _AVX512_BF16_FEATURES | {"amx_tile", "amx_bf16"},
        "x86_64",
    ),
    IsaLevel(
        "avx512_bf16",
        (*_AVX512_BF16, "-mtune=icelake-server"),
        _AVX512_BF16_FEATURES,
        "x86_64",
    ),
    IsaLevel("avx512", (*_AVX512, "-mtune=skylake-avx512"), _AVX512_FEATURES, "x86_64"),
    IsaLevel("avx2", (*_AVX2, "-mtune=haswell"), frozenset({"avx2", "fma", "f16c"}), "x86_64"),
    IsaLevel(
        "neon_bf16",
        ("-march=armv8.2-a+dotprod+bf16", "-mtune=neoverse-v1"),
        _ARM_V8_2_FEATURES | {"bf16"},
        "aarch64",
    ),
    IsaLevel(
        "neon_dot",
        ("-march=armv8.2-a+dotprod", "-mtune=neoverse-n1"),
        _ARM_V8_2_FEATURES,
        "aarch64",
    ),
    IsaLevel("neon", ("-march=armv8-a",), frozenset({"asimd"}), "aarch64"),
    IsaLevel("baseline", (), frozenset()),
)


class NativeBuildError(Exception):
    """No compiler, or it refused the sources; the message is one line and says which."""


def library_directory() -> Path:
    """``CHUNKLLAMA_NATIVE_DIR``, else ``native`` below the cache folder."""
    chosen = os.environ.get("CHUNKLLAMA_NATIVE_DIR")
    if chosen:
        return Path(chosen)
    return cache_folder() / "native"


def known_levels(machine: str = "") -> tuple[IsaLevel, ...]:
    """The levels for a kind of machine (default: this one's), best first, its CPU may lack some."""
    wanted = machine or platform.machine()
    return tuple(level for level in LEVELS if level.machine in ("", wanted))


def available_levels() -> tuple[IsaLevel, ...]:
    """The levels whose instructions this machine has, best first."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    return levels_of(cpuinfo)


def levels_of(cpuinfo: str) -> tuple[IsaLevel, ...]:
    """The levels that a CPU of this kind of machine has, best first.

    Intel's CPUs multiply bf16 pairs on the vector units at half the rate of floats (measured: 0.75
    against 0.18 ns for an instruction on one of 2023, which multiplies twice as many numbers), so
    there avx512 precedes avx512_bf16; with tiles they have amx.

    Args:
        cpuinfo: text of its /proc/cpuinfo. A level needs its features on every processor: a
            thread may run on any of them.
    """
    lines = [
        line.split(":", 1)[1].split()
        for line in cpuinfo.splitlines()
        if line.startswith(("flags", "Features"))  # x86, ARM
    ]
    features = set(lines[0]).intersection(*lines[1:]) if lines else set()
    levels = {level.name: level for level in known_levels() if level.features <= features}
    if "GenuineIntel" in cpuinfo and "avx512_bf16" in levels:
        for name in [name for name in ("avx512_bf16", "avx2", "baseline") if name in levels]:
            levels[name] = levels.pop(name)
    return tuple(levels.values())


def build(level: IsaLevel, sanitizer: str = "") -> Path:
    """The library of a level: shipped, cached, or compiled now.

    Raises:
        NativeBuildError: it is not there and cannot be compiled.
    """
    directory = library_directory()
    sources = _source_hash(level, sanitizer)
    shipped = _shipped(level, sources)
    if shipped.exists():
        return shipped
    compiler = find_compiler()
    if shutil.which(compiler[0]) is None:
        found = sorted(directory.glob(f"{level.name}-{sources}-*.so"))
        if found:
            return found[-1]
        raise NativeBuildError(
            f"no C++ compiler ({compiler[0]}) found; install g++ or set CXX to a g++ or clang++"
        )
    library = directory / f"{level.name}-{sources}-{_compiler_hash(compiler)}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".lock"):
            if not library.exists():
                _compile(compiler, level, sanitizer, library)
    except OSError as error:
        raise NativeBuildError(f"cannot write {directory}: {error.strerror}") from error
    return library


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``CXX``, else g++ or clang++; it need not be installed."""
    installed = [name for name in _COMPILERS if shutil.which(name)]
    return shlex.split(os.environ.get("CXX") or "") or [*installed, *_COMPILERS][:1]


def compiler_target(compiler: list[str]) -> tuple[str, str]:
    """The machine, as ``platform.machine`` names it, and the system that a compiler compiles for.

    Both are empty where the compiler is not installed.
    """
    if shutil.which(compiler[0]) is None:
        return "", ""
    command = [*compiler, "-dumpmachine"]  # prints x86_64-linux-gnu, x86_64-redhat-linux, ...
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    machine, _, system = done.stdout.strip().partition("-")
    return machine, system


def is_built(level: IsaLevel) -> bool:
    """Return whether a library of these sources is there, shipped or made by any compiler."""
    sources = _source_hash(level, "")
    if _shipped(level, sources).exists():
        return True
    return any(library_directory().glob(f"{level.name}-{sources}-*.so"))


def compile_shipped(folder: Path) -> list[Path]:
    """Compile every level that the compiler knows into a folder of the wheel; returns their paths.

    A cross compiler compiles those of its target. They use the system's libstdc++, as torch does: a
    static one needs the glibc of the compiler.

    Raises:
        NativeBuildError: it refuses all of them; the message is of the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    libraries, refused = [], None
    for level in known_levels(compiler_target(compiler)[0]):
        library = folder / _shipped(level, _source_hash(level, "")).name
        try:
            _compile(compiler, level, "", library)
        except NativeBuildError as error:
            refused = error
        else:
            libraries.append(library)
    if refused is not None and not libraries:
        raise refused
    return libraries


def _shipped(level: IsaLevel, sources: str) -> Path:
    return _SHIPPED_FOLDER / f"{level.name}-{sources}.so"


def _source_files() -> list[Path]:
    folder = data_folder("kernels") / "cpu"
    return sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".h"))


def _source_hash(level: IsaLevel, sanitizer: str) -> str:
    digest = hashlib.sha256(
        repr((level.name, level.flags, COMMON_FLAGS, _GCC_FLAGS, sanitizer)).encode()
    )
    for path in _source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler_hash(compiler: list[str]) -> str:
    return hashlib.sha256(_version(compiler) + platform.machine().encode()).hexdigest()[:8]


def _version(compiler: list[str]) -> bytes:
    return subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(
    compiler: list[str],
    level: IsaLevel,
    sanitizer: str,
    library: Path,
) -> None:
    """Compile and link a library; it names no OpenMP runtime, see ``abi.load_openmp``."""
    is_clang = b"clang" in _version(compiler)
    flags = [*COMMON_FLAGS, *(() if is_clang else _GCC_FLAGS), *level.flags]
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources = [path for path in _source_files() if path.suffix == ".cpp"]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        _run(
            [*compiler, *flags, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        )
        linked = Path(folder) / "linked.so"
        link = [*compiler, "-shared", "-o", str(linked), *objects]
        _run([link + ([f"-fsanitize={sanitizer}"] if sanitizer else [])])
        linked.replace(library)


def _run(commands: Iterable[list[str]]) -> None:
    """All at once; the first error is raised when all have ended."""
    english = {**os.environ, "LC_ALL": "C"}
    jobs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=english)
        for command in commands
    ]
    messages = [job.communicate()[1] for job in jobs]
    for job, message in zip(jobs, messages, strict=True):
        if job.returncode != 0:
            lines = [line for line in message.splitlines() if "error" in line]
            reason = lines[0].strip() if lines else "compiler failed"
            raise NativeBuildError(f"the native backend did not compile: {reason}")
