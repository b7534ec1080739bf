"""The wheel, built from the source distribution, runs at full speed where there is no compiler."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from chunkllama import __version__
from chunkllama.backends.cpu import build as native

ROOT = Path(__file__).resolve().parents[2]
LEVEL = native.available_levels()[-1]
ARM_COMPILER = "aarch64-linux-gnu-g++"
AS_ANOTHER_USER = ("unshare", "--user", "--map-user=10001", "--map-group=0")


def _tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if (ROOT / line).is_file()]


def _copy_of_the_repository(folder: Path) -> Path:
    for line in _tracked():
        if line.startswith(("benchmarks/", "tests/")):
            continue
        (folder / line).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / line, folder / line)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = _copy_of_the_repository(tmp_path_factory.mktemp("sources"))
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    (built,) = out.glob("*.tar.gz")
    assert built.name == f"chunkllama-{__version__}.tar.gz"
    return built


def _build_wheel(sdist: Path, out: Path, **environment: str) -> Path:
    """Build a wheel from the sdist alone."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(out), str(sdist)],
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    (built,) = out.glob("*.whl")
    return built


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_sdist_and_wheel_carry_everything_and_are_installed(sdist: Path, tmp_path: Path) -> None:
    wheel = _build_wheel(sdist, tmp_path, CHUNKLLAMA_SHIP_NATIVE="0")
    assert wheel.name == f"chunkllama-{__version__}-py3-none-any.whl"
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    wanted = {line for line in _tracked() if line.startswith("chunkllama/")}
    wanted |= {line.removeprefix("server/") for line in _tracked() if line.startswith("server/")}
    wanted |= {
        f"chunkllama/_{line}"
        for line in _tracked()
        if line.startswith(("kernels/", "configs/")) and line.count("/") == 2
    }
    assert len(wanted) > 400
    assert not {name for name in wanted if not (target / name).is_file()}
    done = subprocess.run(
        [sys.executable, "-P", str(target / "bin" / "chunkllama"), "--version"],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == __version__


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _unpack(wheel, tmp_path_factory.mktemp("installed"))


@contextmanager
def _running(installed: Path, home: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run Python on the installed package: no compiler, and no folder that can be written.

    As uid 10001 without root's rights, where this user may make a namespace for it.
    """
    home.mkdir(exist_ok=True)
    home.chmod(0o500)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("CHUNKLLAMA_")},
        "PYTHONPATH": str(installed),
        "CXX": "no-such-compiler",
        "HOME": str(home),
        "CHUNKLLAMA_CACHE": str(home / "cache"),
    }
    may_map = subprocess.run([*AS_ANOTHER_USER, "true"], capture_output=True).returncode == 0
    command = [*(AS_ANOTHER_USER if may_map else ()), sys.executable, "-P", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=home, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def _run(installed: Path, code: str, home: Path) -> str:
    with _running(installed, home, "-c", code) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip()


def _check_libraries(wheel: Path, installed: Path, machine: str, objdump: str) -> None:
    libraries = sorted((installed / "chunkllama" / "_native").glob("*.so"))
    assert {path.name.partition("-")[0] for path in libraries} == {
        x.name for x in native.known_levels(machine)
    }
    tag = re.search(rf"-py3-none-manylinux_2_(\d+)_{machine}\.whl$", wheel.name)
    assert tag is not None and int(tag[1]) <= 28
    needed = subprocess.run(
        [objdump, "-p", *map(str, libraries)], check=True, capture_output=True, text=True
    ).stdout
    own = {"libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert set(re.findall(r"NEEDED\s+(\S+)", needed)) <= {"libc.so.6", "libm.so.6", *own}
    formats = set(re.findall(r"file format (\S+)", needed))
    assert formats == {f"elf64-{machine.replace('_', '-').replace('aarch64', 'littleaarch64')}"}
    assert max([24, *map(int, re.findall(r"GLIBCXX_3\.4\.(\d+)", needed))]) <= 24
    assert max(int(v) for v in re.findall(r"GLIBC_2\.(\d+)", needed)) <= 28
    assert sum(path.stat().st_size for path in libraries) < 10 << 20


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels are shipped for x86-64")
def test_the_wheel_holds_every_level_for_an_old_glibc(wheel: Path, installed: Path) -> None:
    _check_libraries(wheel, installed, "x86_64", "objdump")


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=f"there is no {ARM_COMPILER}")
def test_a_cross_compiler_makes_a_wheel_for_arm(sdist: Path, tmp_path: Path) -> None:
    wheel = _build_wheel(sdist, tmp_path, CXX=ARM_COMPILER)
    installed = _unpack(wheel, tmp_path / "installed")
    _check_libraries(wheel, installed, "aarch64", "aarch64-linux-gnu-objdump")


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels are shipped for x86-64")
def test_the_wheel_serves_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_model(model)
    code = (
        "import chunkllama, sys; from chunkllama import LLM, SamplingParams\n"
        f"llm = LLM({str(model)!r}, num_chunks=16)\n"
        "greedy = SamplingParams(temperature=0, max_tokens=8)\n"
        "ids = llm.generate([[1, 2, 3]], greedy)[0].outputs[0].token_ids\n"
        "info = llm._core.info\n"
        "print(chunkllama.__version__, chunkllama.__file__, info.backend, info.isa_level, ids)"
    )
    version, file, name, level, ids = _run(installed, code, tmp_path / "home").split(maxsplit=4)
    assert Path(file).is_relative_to(installed)
    assert (version, name) == (__version__, "cpu")
    assert level == native.available_levels()[0].name
    own = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split(maxsplit=4)
    assert own[4].strip() == ids  # the library that is compiled on this machine


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels are shipped for x86-64")
def test_the_wheel_s_server_answers_with_a_read_only_home(installed: Path, tmp_path: Path) -> None:
    model, home = tmp_path / "model", tmp_path / "home"
    model.mkdir()
    write_tiny_model(model)
    flags = ["--model", model, "--port", 0, "--num-chunks", 16]
    with _running(installed, home, "-m", "chunkllama_server.cli", "serve", *flags) as server:
        assert server.stderr is not None
        log = ""
        while (ready := re.search(r"http://127\.0\.0\.1:\d+", log)) is None or "ready" not in log:
            line = server.stderr.readline()
            assert line, log
            log += line
        body = json.dumps({"model": "model", "prompt": [1, 2, 3], "max_tokens": 4}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{ready[0]}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        server.terminate()
        server.communicate()
    assert server.returncode == 0
    assert "WARNING" not in log and list(home.iterdir()) == []


def test_a_shipped_library_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_SHIPPED_FOLDER", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(tmp_path / "empty"))
    assert not native.is_built(LEVEL)
    with pytest.raises(native.NativeBuildError, match="no C\\+\\+ compiler"):
        native.build(LEVEL)
    shipped = tmp_path / f"{LEVEL.name}-{native._source_hash(LEVEL, '')}.so"
    shipped.touch()
    assert native.build(LEVEL) == shipped and native.is_built(LEVEL)
    shipped.rename(tmp_path / f"{LEVEL.name}-0123456789abcdef.so")  # of other sources
    assert not native.is_built(LEVEL)
    with pytest.raises(native.NativeBuildError, match="no C\\+\\+ compiler"):
        native.build(LEVEL, "address")


def test_a_library_names_no_openmp_runtime() -> None:
    """It uses the one that torch has loaded, under any name."""
    library = native.build(LEVEL)
    listing = subprocess.run(
        ["readelf", "-d", str(library)], check=True, capture_output=True, text=True
    ).stdout
    assert "NEEDED" in listing and "gomp" not in listing


@pytest.mark.parametrize("first", ["torch", "sentencepiece"])
def test_the_openmp_runtime_is_torchs_whatever_was_loaded_before(first: str) -> None:
    """sentencepiece brings a runtime of its own, with threads of its own."""
    code = (
        f"import ctypes, {first}, sentencepiece, torch\n"
        "from chunkllama.backends.cpu.abi import load_library\n"
        "from chunkllama.backends.cpu.build import available_levels\n"
        "load_library(available_levels()[0])\n"
        "function = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value\n"
        "for line in open('/proc/self/maps'):\n"
        "    begin, end = (int(part, 16) for part in line.split()[0].split('-'))\n"
        "    if begin <= function < end:\n"
        "        print(line.split(maxsplit=5)[5])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    import torch

    own = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    assert Path(found) in own or (not own and "libgomp" in found)
