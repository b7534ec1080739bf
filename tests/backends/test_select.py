"""Which backend a device gets, and what a user reads when it cannot be had."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from chunkllama.backends.base import Backend
from chunkllama.backends.cpu import backend as cpu_backend
from chunkllama.backends.cpu.build import LEVELS, available_levels
from chunkllama.backends.select import BackendName, select_backend
from chunkllama.config import ModelConfig
from chunkllama.errors import ConfigError


def select(
    device: str = "cpu",
    *,
    backend: BackendName = "auto",
    chunk_size: int = 64,
    head_dim: int = 64,
    isa_level: str = "auto",
) -> Backend:
    return select_backend(
        device,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        head_dim=head_dim,
        chunk_size=chunk_size,
        num_kv_heads=3,
        backend=backend,
        isa_level=isa_level,
    )


@pytest.mark.parametrize("level", [level.name for level in available_levels()])
def test_a_named_level_is_the_one_that_runs(level: str) -> None:
    assert select(isa_level=level).isa_level == level


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_level_that_the_cpu_lacks_is_refused_by_name(
    backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [level for level in LEVELS if level.name in ("avx2", "baseline")]
    monkeypatch.setattr(cpu_backend, "available_levels", lambda: levels)
    with pytest.raises(ConfigError, match=r"isa_level: this CPU lacks amx; use auto .* avx2, base"):
        select(isa_level="amx", backend=backend)


def test_a_level_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(ConfigError, match="isa_level: avx2 is for the cpu backend only"):
        select(isa_level="avx2", backend="reference")


def test_the_setting_lists_every_level() -> None:
    choices = get_args(ModelConfig.model_fields["isa_level"].annotation)
    assert choices == ("auto", *(level.name for level in LEVELS))


def test_the_reference_by_name() -> None:
    backend = select(backend="reference", chunk_size=16)
    assert backend.name == "reference"
    assert backend.device == torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing is built, and nothing can be."""
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -O0")


@pytest.mark.usefixtures("no_compiler")
def test_a_cpu_without_a_compiler_runs_the_reference_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert select().name == "reference"
    assert len(caplog.records) == 1
    assert "no C++ compiler (no-such-compiler) found" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_native_by_name_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match=r"backend: cpu .* C\+\+ compiler"):
        select(backend="cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch sees two GPUs, and no CuPy is installed."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_without_cupy_runs_the_reference_and_names_the_extra(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = select(device)
    assert (backend.name, backend.device) == ("reference", torch.device(device))
    assert len(caplog.records) == 1
    assert "pip install 'chunkllama[cu1" in caplog.text


@pytest.mark.usefixtures("two_gpus")
def test_cuda_by_name_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match=r"chunkllama\[cu1[23]\]"):
        select("cuda", backend="cuda")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
def test_a_gpu_that_is_not_there_is_named(backend: BackendName) -> None:
    with pytest.raises(ConfigError, match="cuda:2 does not exist, the number of GPUs is 2"):
        select("cuda:2", backend=backend)


def test_a_gpu_on_a_machine_without_one() -> None:
    with pytest.raises(ConfigError, match="cuda:1 was asked for, but there is no CUDA device"):
        select("cuda:1")


def test_a_backend_on_the_wrong_device() -> None:
    with pytest.raises(ConfigError, match="cpu runs on device cpu"):
        select("cuda", backend="cpu")
    with pytest.raises(ConfigError, match="cuda needs device cuda"):
        select("cpu", backend="cuda")
    for device in ("mps", "gpu"):
        with pytest.raises(ConfigError, match=f"device: '{device}' is not one of"):
            select(device)


def test_a_chunk_size_the_reference_lacks() -> None:
    with pytest.raises(ConfigError, match="chunk_size: 48 is not one of 16, 32, 64, 128"):
        select(backend="reference", chunk_size=48)
