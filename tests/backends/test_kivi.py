"""KIVI against plain torch: keys per channel of a chunk, values per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chunkllama.backends.kivi import KiviCodec

SHAPE = (3, 2, 2, 64, 16)
KEY_TOKENS = {2: 64, 4: 16}  # of a group
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """x' = round((x - zero) / scale) scale + zero over ``dim``, scale and zero in float16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((x - zero) / scale).round().clamp(0, 2**bits - 1)
    return codes * scale + zero


def plain_chunk(wide: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys per channel of a group of tokens, values per token."""
    keys = plain(wide[:, 0].unflatten(2, (-1, KEY_TOKENS[bits])), bits, 3).flatten(2, 3)
    return torch.stack((keys, plain(wide[:, 1], bits, 3)), dim=1)


def ranges(wide: torch.Tensor, bits: int) -> torch.Tensor:
    """Largest less smallest value of each value's group."""
    keys = wide[:, 0].unflatten(2, (-1, KEY_TOKENS[bits]))
    found = [(x.amax(3, keepdim=True) - x.amin(3, keepdim=True)) for x in (keys, wide[:, 1])]
    return torch.stack((found[0].expand_as(keys).flatten(2, 3), found[1].expand_as(wide[:, 1])), 1)


def chunk_of(rng: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Some channels of keys are large in every token, as those of models are."""
    chunk = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))
    chunk[:, 0, :, :, ::5] += 20
    return chunk.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_read_is_what_plain_torch_rounds_to(
    rng: np.random.Generator, bits: int, dtype: torch.dtype
) -> None:
    chunk = chunk_of(rng, dtype)
    codec = KiviCodec(bits, SHAPE, dtype)  # type: ignore[arg-type]
    data = codec.encode(chunk)
    assert data is not None and len(data) == codec.num_bytes
    found = codec.decode(data)
    assert found.dtype == dtype and found.shape == chunk.shape
    wide = chunk.float()
    expected = plain_chunk(wide, bits)
    # A value within a rounding of the middle between two codes may get either.
    same = (found.float() - expected.to(dtype).float()).abs() <= 1e-5 * expected.abs()
    assert same.float().mean() > 0.999
    error = (found.float() - wide).abs()
    assert (error <= ranges(wide, bits) / (2**bits - 1) * 0.52 + 0.005 * wide.abs() + 0.02).all()


def test_keys_with_large_channels_are_rounded_channel_by_channel(rng: np.random.Generator) -> None:
    """Per token, a channel of 20 would leave the others one code."""
    chunk = chunk_of(rng, torch.float32)
    codec = KiviCodec(2, SHAPE, torch.float32)
    found = codec.decode(codec.encode(chunk))
    error = (found - chunk)[:, 0].square().mean()
    per_token = (plain(chunk[:, 0], 2, 3) - chunk[:, 0]).square().mean()
    assert error < 0.1 * per_token


def test_a_chunk_takes_a_fifth_or_a_third_of_bfloat16() -> None:
    whole = 30 * 2 * 3 * 64 * 64 * 2
    sizes = {bits: KiviCodec(bits, (30, 2, 3, 64, 64), torch.bfloat16).num_bytes for bits in (2, 4)}
    assert whole / sizes[2] > 5 and whole / sizes[4] > 3


def test_equal_values_and_zeros_come_back_as_they_are() -> None:
    for value in (0.0, -3.5):
        chunk = torch.full(SHAPE, value)
        codec = KiviCodec(2, SHAPE, torch.float32)
        assert torch.equal(codec.decode(codec.encode(chunk)), chunk)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5])
def test_what_float16_does_not_hold_is_refused(value: float) -> None:
    chunk = torch.zeros(SHAPE)
    chunk[1, 0, 0, 5, 5] = value
    assert KiviCodec(2, SHAPE, torch.float32).encode(chunk) is None
