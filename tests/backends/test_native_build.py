"""Libraries of the native ops: their names, and what is said when one cannot be had."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunkllama.backends.cpu import abi
from chunkllama.backends.cpu import backend as native
from chunkllama.backends.cpu.abi import load_library
from chunkllama.backends.cpu.build import (
    LEVELS,
    IsaLevel,
    NativeBuildError,
    _source_hash,
    available_levels,
    build,
    find_compiler,
)
from chunkllama.backends.cpu.memory import allocate_lazily
from chunkllama.resources import data_folder

BASELINE = LEVELS[-1]


def test_names_do_not_depend_on_the_hash_seed() -> None:
    """They are the same in every process: an image built once finds its libraries again."""
    code = (
        "from chunkllama.backends.cpu.build import LEVELS, _source_hash;"
        "print([_source_hash(level, '') for level in LEVELS])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_a_library_built_before_serves_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        build(BASELINE)
    library = tmp_path / f"baseline-{_source_hash(BASELINE, '')}-0123.so"
    library.touch()
    assert build(BASELINE) == library
    with pytest.raises(NativeBuildError, match="cannot be loaded"):
        load_library(BASELINE)  # an empty file


def test_a_compiler_that_refuses_is_quoted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "refusing compiler"
    compiler.write_text("#!/bin/sh\necho \"c++: error: what is '-mnew'?\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    directory = tmp_path / "native"
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(directory))
    monkeypatch.setenv("CXX", f"'{compiler}' -mnew")
    with pytest.raises(NativeBuildError, match="error: what is '-mnew'"):
        build(BASELINE)
    assert [path.name for path in directory.iterdir()] == [".lock"]


def test_structures_of_other_sizes_than_the_library_has_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CLonger(abi.CHeads):
        _fields_ = (("added", ctypes.c_int64),)

    monkeypatch.setitem(abi._MIRRORED, "Heads", CLonger)
    with pytest.raises(NativeBuildError, match=r"CLonger has 40 bytes, but Heads .* has 32"):
        load_library(BASELINE)
    monkeypatch.undo()
    load_library(BASELINE)


def test_every_structure_of_the_interface_is_compared() -> None:
    sources = data_folder("kernels") / "cpu"
    exported = set(re.findall(r"SIZE\((\w+)\)", (sources / "ops.cpp").read_text())) - {"type"}
    assert exported == set(abi._MIRRORED)
    declared = set(re.findall(r"^struct (\w+) {", (sources / "api.h").read_text(), re.M))
    assert declared <= exported


def test_the_next_level_stands_in_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best, *others = available_levels()
    if not others:
        pytest.skip("not run: this CPU has the baseline only")

    def load(level: IsaLevel, sanitizer: str) -> object:
        if level == best:
            raise NativeBuildError("the compiler is too old")
        return load_library(level, sanitizer)

    monkeypatch.setattr(native, "load_library", load)
    with caplog.at_level(logging.WARNING):
        ops = native.CpuBackend(dtype=torch.float32, head_dim=64, num_kv_heads=1)
    assert ops.level == others[0].name
    assert f"{best.name}: the compiler is too old" in caplog.text


def test_more_memory_than_there_is() -> None:
    for elements in (1 << 46, 1 << 70):
        with pytest.raises(MemoryError):
            allocate_lazily(elements, torch.float32)


@pytest.mark.parametrize(("version", "is_gcc"), [("g++ (Debian) 12.2", True), ("clang 14", False)])
def test_flags_of_gcc_alone_are_not_given_to_clang(
    version: str, is_gcc: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "{version}"; exit; fi\n'
        f'echo "$@" >> "{log}"\n'
        'while [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(tmp_path / "native"))
    monkeypatch.setenv("CXX", str(compiler))
    build(BASELINE)
    *compiled, linked = log.read_text().splitlines()
    assert all(("-fno-gnu-unique" in line) == is_gcc for line in compiled)
    assert "-shared" in linked
    # Clang's OpenMP is another runtime than the one that torch has loaded.
    assert not any("openmp" in line for line in (*compiled, linked))


def test_the_first_installed_compiler_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == ["g++"]
    for name in ("clang++", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_compiler() == [name]
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert find_compiler() == ["clang++", "-O2"]
