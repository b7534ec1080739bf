"""Test the CuPy launcher on a fake CuPy: what is compiled when, and what a launch passes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chunkllama.backends.cuda.launch import CupyLauncher
from chunkllama.backends.cuda.source import cuda_source, hardware_tables, merge_kernel
from chunkllama.errors import ConfigError

LARGE = hardware_tables()[-1].tiles[128][0].kernel("bf16")  # over 48 KiB of shared memory


class FakeFunction:
    """What ``RawModule.get_function`` returns."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.num_regs, self.local_size_bytes = 160, 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: Any) -> None:
        call = {"grid": grid, "block": block, "args": args, "shared_mem": shared_mem}
        self.calls.append(call | {"stream": stream.ptr})


class FakeCupy(ModuleType):
    def __init__(self) -> None:
        super().__init__("cupy")
        self.modules: list[tuple[dict[str, Any], FakeFunction]] = []
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
        self.cuda = SimpleNamespace(runtime=runtime)

    def RawModule(self, **arguments: Any) -> Any:
        function = FakeFunction()
        self.modules.append((arguments, function))
        return SimpleNamespace(get_function=lambda name: function)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """A CuPy that records, on a machine that seems to have one H200."""
    fake = FakeCupy()
    properties = SimpleNamespace(
        major=9, minor=0, shared_memory_per_block_optin=232448, multi_processor_count=132
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77 + index, False)
    return fake


def test_a_kernel_is_compiled_once_from_one_text(cupy: FakeCupy) -> None:
    launcher = CupyLauncher(torch.device("cuda"))
    assert (launcher.table.arch, launcher.num_sms) == ("sm_90", 132)
    for _ in range(3):
        launcher.launch(LARGE, (7, 1, 1), bytes(112))
    ((arguments, function),) = cupy.modules
    assert arguments["code"] == cuda_source("tpp_partial.cuh")
    assert arguments["name_expressions"] == [LARGE.expression]
    assert function.max_dynamic_shared_size_bytes == LARGE.shared_bytes
    assert len(function.calls) == 3


def test_prepared_kernels_are_not_compiled_by_their_first_launch(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _index: nullcontext())
    launcher = CupyLauncher(torch.device("cuda"))
    kernels = [LARGE, merge_kernel("bf16", 128)]
    launcher.prepare(kernels)
    assert [a["name_expressions"] for a, _ in cupy.modules] == [[k.expression] for k in kernels]
    assert all(not function.calls for _, function in cupy.modules)
    launcher.launch(LARGE, (7, 1, 1), bytes(112))
    assert len(cupy.modules) == 2


def test_a_launch_passes_the_struct_by_value_on_torchs_stream(cupy: FakeCupy) -> None:
    launcher = CupyLauncher(torch.device("cuda:0"))
    kernel, params = merge_kernel("fp16", 64), bytes(range(64))
    launcher.launch(kernel, (5, 8, 1), params)
    (_, function) = cupy.modules[0]
    (call,) = function.calls
    (struct,) = call.pop("args")
    assert call == {"grid": (5, 8, 1), "block": (128, 1, 1), "shared_mem": 0, "stream": 77}
    assert struct.dtype == np.dtype("V64") and struct.size == 1 and struct.tobytes() == params
    assert function.max_dynamic_shared_size_bytes == 48 * 1024, "raised only where it is needed"


def test_a_cupy_of_another_cuda_is_refused(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expected = r"CuPy for CUDA 13, .* is for CUDA 12; run: pip install 'chunkllama\[cu13\]'"
    with pytest.raises(ConfigError, match=expected):
        CupyLauncher(torch.device("cuda"))


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cu12"), ("13.0", "cu13"), (None, "cu12")])
def test_without_cupy_the_extra_to_install_is_named(
    cuda: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=rf"pip install 'chunkllama\[{extra}\]'"):
        CupyLauncher(torch.device("cuda"))


def test_importing_the_backend_imports_no_cupy() -> None:
    code = (
        "import sys, chunkllama, chunkllama.backends.cuda.backend; assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
