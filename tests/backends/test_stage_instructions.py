"""The instructions of a stage of tpp_partial, counted in SASS of NVRTC 12.9: bounds per tile."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from gpu_model import STAGES
from nvrtc import library_path
from sass import nvdisasm_path, stage_instructions

from chunkllama.backends.cuda.source import KernelSpec, TileShape, hardware_tables

TABLES = {table.arch: table for table in hardware_tables()}
# Of a warp, by rows of the tile, for head_dims up to 128.
BOUNDS = {16: 220, 32: 255, 64: 450}
WIDE_BOUNDS = {16: 345, 32: 305, 64: 435}  # head_dim 256


@functools.cache
def counted(arch: str, head_dim: int) -> dict[KernelSpec, Counter[str]]:
    if library_path() is None:
        pytest.skip("the nvidia-cuda-nvrtc-cu12 wheel is not installed (extra dev)")
    if nvdisasm_path() is None:
        pytest.skip("no nvdisasm: neither a CUDA toolkit nor the nvidia-cuda-nvdisasm wheel")
    return stage_instructions(arch, [tile.kernel("bf16") for tile in TABLES[arch].tiles[head_dim]])


def expected(tile: TileShape) -> dict[str, int]:
    """Tensor core products, ldmatrix and copies of a warp's share of a stage."""
    keys = tile.stage_tokens // tile.key_warps
    columns, pairs = tile.head_dim // 16, keys // 16
    queries = 0 if tile.row_tiles * tile.head_dim <= 128 else columns * tile.row_tiles
    return {
        "HMMA": tile.row_tiles * (2 * columns * keys // 8 + pairs),  # and the sums of weights
        "LDSM": 2 * columns * pairs + queries,
        "LDGSTS": 2 * tile.stage_tokens * tile.head_dim // 8 // tile.threads,
    }


@pytest.mark.parametrize(
    ("arch", "head_dim"),
    [
        pytest.param(arch, d, marks=() if (arch, d) == ("sm_90", 128) else pytest.mark.nightly)
        for arch in TABLES
        for d in TABLES[arch].tiles
    ],
)
def test_stage_instructions_are_within_their_bounds(arch: str, head_dim: int) -> None:
    for tile in TABLES[arch].tiles[head_dim]:
        found = counted(arch, head_dim)[tile.kernel("bf16")]
        assert {k: found[k] for k in expected(tile)} == expected(tile), "another path was counted"
        bounds = WIDE_BOUNDS if head_dim == 256 else BOUNDS
        assert found.total() <= bounds[tile.rows], found
        if head_dim == 128 and (arch, tile.rows) in STAGES:
            stage = STAGES[arch, tile.rows]
            assert (stage.constant, stage.mma, stage.ldmatrix) == (
                found.total(),
                found["HMMA"],
                found["LDSM"],
            ), "benchmarks/gpu_model.py has other counts"
