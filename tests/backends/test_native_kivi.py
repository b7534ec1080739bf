"""Rounded chunks in the pool's layout, at every level: bit for bit what the codec decodes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.build import available_levels
from chunkllama.backends.kivi import KiviCodec

# (layers, kv heads, head_dim)
SHAPES = [(1, 1, 16), (3, 2, 32), (2, 3, 64), (2, 1, 80), (1, 2, 96), (1, 1, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("level", [level.name for level in available_levels()])
def test_a_rounded_chunk_is_widened_as_the_codec_decodes_it(
    rng: np.random.Generator,
    level: str,
    bits: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> None:
    layers, heads, dim = shape
    sanitizer = os.environ.get("CHUNKLLAMA_TEST_SANITIZER", "")
    ops = CpuBackend(
        dtype=dtype, level=level, sanitizer=sanitizer, num_kv_heads=heads, head_dim=dim
    )
    kv = ops.allocate_kv(
        num_layers=layers,
        num_chunks=2,
        num_kv_heads=heads,
        chunk_size=64,
        head_dim=dim,
        dtype=dtype,
    )
    codec = KiviCodec(bits, (layers, 2, heads, 64, dim), dtype)  # type: ignore[arg-type]
    values = rng.standard_normal(codec.shape) * 10.0 ** rng.integers(-6, 4, codec.shape)
    values[:, :, :, ::7] = 0.0
    values[:, 1, 0, 3] = 2.5  # a group of one value
    data = codec.encode(torch.from_numpy(values).to(dtype))
    assert data is not None
    widened = ops.widen_chunk(kv, codec, data)
    assert torch.equal(widened, ops.arrange_chunk(kv, codec.decode(data)))
    ops.write_chunk(kv, 1, widened)
    assert torch.equal(ops.restore_chunk(kv, ops.copy_chunk(kv, 1)), codec.decode(data))
