"""Which device a setting means, on machines with and without GPUs."""

from __future__ import annotations

import pytest
import torch

from chunkllama.engine import size
from chunkllama.engine.size import find_device
from chunkllama.errors import ConfigError


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(size, "may_have_gpu", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_a_device(gpus: int, wanted: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus)
    assert find_device(wanted) == device


@pytest.mark.parametrize(
    ("gpus", "wanted", "message"),
    [
        (0, "cuda", "device: cuda was asked for, but there is no CUDA device; use cpu"),
        (0, "cuda:1", "device: cuda:1 was asked for, but there is no CUDA device; use cpu"),
        (2, "cuda:2", "device: cuda:2 does not exist, the number of GPUs is 2"),
    ],
)
def test_a_gpu_that_is_not_there(
    gpus: int, wanted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=message):
        find_device(wanted)
