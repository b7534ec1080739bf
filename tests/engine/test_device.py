"""Which device a setting means, with and without GPUs; what is prepared on it before requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.engine import build, size
from chunkllama.engine.load import build_attention
from chunkllama.engine.size import find_device
from chunkllama.errors import ConfigError
from chunkllama.model_spec import LayerSpec, ModelSpec

SPEC = ModelSpec(
    num_layers=2,
    hidden_size=64,
    intermediate_size=64,
    num_qo_heads=1,
    num_kv_heads=1,
    head_dim=64,
    vocab_size=16,
    max_position=64,
)


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


@pytest.mark.parametrize(
    ("fields", "is_bounded"),
    [
        ({}, False),
        ({"layers": (LayerSpec(window=7), LayerSpec())}, True),
        ({"attention_softcap": 3.0}, True),
    ],
)
def test_a_backend_is_prepared_for_the_model(
    fields: dict[str, Any], is_bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[bool] = []
    monkeypatch.setattr(
        ReferenceBackend, "prepare", lambda _self, *, is_bounded: prepared.append(is_bounded)
    )
    build_attention(
        replace(SPEC, **fields),
        device="cpu",
        dtype=torch.float32,
        num_chunks=2,
        chunk_size=64,
        backend="reference",
    )
    assert prepared == [is_bounded]


def test_memory_that_runs_out_at_the_start_is_one_line(
    tiny_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises it for a weight when others have taken what was free."""

    def allocate(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(build, "load_step_model", allocate)
    with pytest.raises(ConfigError) as raised:
        tiny_core(num_chunks=8)
    message = str(raised.value)
    assert re.match(r"model: cpu lacks memory for the weights \(\d+ MiB\); set quant", message)
    assert "\n" not in message
