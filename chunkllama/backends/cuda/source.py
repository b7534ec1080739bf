"""Native sources and per-device tables: where they lie, what is compiled from them for a device.

Knows text and numbers only: no torch, no CuPy, no compiler. ``ops/launch.py`` compiles what this
module names, the compile gate and the emulator build the same names from the same text.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from chunkllama.errors import ConfigError
from chunkllama.resources import data_folder

DTYPES: Final = ("bf16", "fp16")
HEAD_DIMS: Final = (64, 96, 128, 256)
CHUNK_SIZE: Final = 64
REGISTERS_PER_SM: Final = 65536

# NVRTC options of every kernel; CuPy adds the device's own architecture.
COMPILE_OPTIONS: Final = ("--std=c++17",)


@dataclass(frozen=True, slots=True)
class ParamStruct:
    """A kernel's parameter struct: fields that change from call to call, then those a plan fixes.

    The sources assert the sizes; "=" because a plan's part need not begin at a multiple of 8.
    """

    call: struct.Struct
    plan: struct.Struct = field(default_factory=lambda: struct.Struct("="))

    @property
    def size(self) -> int:
        return self.call.size + self.plan.size


PARAMS: Final = {
    "TppPartialParams": ParamStruct(struct.Struct("=4Q2f"), struct.Struct("=5i4x6Qq")),
    "TppMergeParams": ParamStruct(struct.Struct("=Q"), struct.Struct("=6Qi4x")),
    "RopeAppendParams": ParamStruct(struct.Struct("=5Q"), struct.Struct("=3Qq2i")),
    "RmsNormParams": ParamStruct(struct.Struct("=5Qif")),
    "SiluAndMulParams": ParamStruct(struct.Struct("=2Qi4x")),
    "CopyChunksParams": ParamStruct(struct.Struct("=2Qqi4x")),
    "DrawTokensParams": ParamStruct(struct.Struct("=3Qi4x")),
    "ConformanceParams": ParamStruct(struct.Struct("=3Q")),
}

DRAW_ROW: Final = struct.Struct("=Q3i2I2f4x")  # of draw_tokens: one draw

_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)


@functools.cache
def cuda_source(file_name: str, kernels: Path | None = None) -> str:
    """One text of ``kernels/cuda/<file_name>`` with the project's own includes in place, each once;
    of another ``kernels`` folder if one is given.

    CuPy's disk cache is keyed by the source text and not by included files: with include paths an
    edited header would leave stale kernels behind.
    """
    folder = kernels or data_folder("kernels")
    # The emulation header is included under a macro that NVRTC never defines.
    seen = {file_name, "../emulation/device.h"}

    def expand(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return read(name)

    def read(name: str) -> str:
        text = (folder / "cuda" / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(expand, text)

    return read(file_name)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One specialization: the C++ name expression, the file that holds it, and its launch shape.

    ``params`` names its parameter struct in ``PARAMS``; ``max_registers`` per thread is what the
    compile gate holds it to.
    """

    expression: str
    file_name: str
    params: str
    threads: int
    shared_bytes: int = 0
    max_registers: int = 255


@dataclass(frozen=True, slots=True)
class TileShape:
    """Template arguments of ``Tile`` (kernels/cuda/tpp_partial.cuh) and what they may take."""

    head_dim: int
    row_tiles: int
    row_warps: int
    key_warps: int
    stage_tokens: int
    stages: int
    min_ctas: int
    max_registers: int

    @property
    def rows(self) -> int:
        """Packed rows (rows x query heads per kv head) of a tile."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.key_warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: queries and stages, or the join buffer that reuses them."""
        pipeline = 2 * self.head_dim * (self.rows + self.stages * 2 * self.stage_tokens)
        join = self.key_warps * self.rows * (self.head_dim + 10) * 4
        return max(pipeline, join)

    def kernel(self, dtype: str, *, bounded: bool = False) -> KernelSpec:
        """The specialization for a dtype; a ``bounded`` one knows windows and soft caps."""
        shape = (
            f"{self.head_dim}, {self.row_tiles}, {self.row_warps}, {self.key_warps}, "
            f"{self.stage_tokens}, {self.stages}, {self.min_ctas}{', true' if bounded else ''}"
        )
        return KernelSpec(
            expression=f"tpp_partial<Tile<{dtype}, {shape}>>",
            file_name="tpp_partial.cuh",
            params="TppPartialParams",
            threads=self.threads,
            shared_bytes=self.shared_bytes,
            max_registers=self._most_registers if bounded else self.max_registers,
        )

    @property
    def _most_registers(self) -> int:
        """Registers per thread with which ``min_ctas`` still fit an SM."""
        return min(255, REGISTERS_PER_SM // (self.threads * self.min_ctas) // 8 * 8)


@dataclass(frozen=True, slots=True)
class HardwareTable:
    """Tuning and limits of one GPU architecture (``configs/hardware/sm_*.yaml``).

    Attributes:
        arch: ``sm_<major><minor>``.
        shared_bytes_per_block: what one CTA may use; a device with less cannot run this table.
        shared_bytes_per_sm: of which every resident CTA also takes 1 KiB.
        waves: units the planner aims at, in multiples of the CTAs that run at once.
        min_run_chunks: runs are never cut shorter than this.
        chunk_cost_rows: what reading a chunk costs, in rows of computing on it.
        spare_chunks: chunks reserved beyond a tail: a decode plan lives 64 times as many steps.
        tiles: tile shapes by head_dim, ascending by rows.
    """

    arch: str
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    waves: int
    min_run_chunks: int
    chunk_cost_rows: int
    spare_chunks: int
    tiles: dict[int, tuple[TileShape, ...]]

    @property
    def capability(self) -> tuple[int, int]:
        return int(self.arch[3:-1]), int(self.arch[-1])

    def tile_for(self, head_dim: int, packed_rows: int) -> TileShape:
        """The smallest tile that holds so many packed rows, else the largest one."""
        tiles = self.tiles[head_dim]
        return next((tile for tile in tiles if tile.rows >= packed_rows), tiles[-1])


def parse_hardware_table(data: dict[str, Any]) -> HardwareTable:
    """A table from its file's contents; KeyError or TypeError for anything missing or unknown."""
    shapes = [TileShape(**tile) for tile in data["tiles"]]
    return HardwareTable(
        arch=data["arch"],
        shared_bytes_per_block=data["shared_bytes_per_block"],
        shared_bytes_per_sm=data["shared_bytes_per_sm"],
        waves=data["waves"],
        min_run_chunks=data["min_run_chunks"],
        chunk_cost_rows=data["chunk_cost_rows"],
        spare_chunks=data["spare_chunks"],
        tiles={
            head_dim: tuple(
                sorted((s for s in shapes if s.head_dim == head_dim), key=lambda s: s.rows)
            )
            for head_dim in sorted({shape.head_dim for shape in shapes})
        },
    )


@functools.cache
def hardware_tables() -> tuple[HardwareTable, ...]:
    """Every GPU table, oldest architecture first.

    The files keep to the JSON subset of YAML, so that they need no YAML package where only torch
    and CuPy are.
    """
    tables = []
    for path in sorted((data_folder("configs") / "hardware").glob("sm_*.yaml")):
        try:
            tables.append(parse_hardware_table(json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path.name}: not a hardware table (JSON subset of YAML): {error!r}"
            ) from error
    return tuple(sorted(tables, key=lambda table: table.capability))


def table_for(capability: tuple[int, int], shared_bytes_per_block: int) -> HardwareTable:
    """The table of a device: the newest one not newer than it that fits, else the roomiest.

    Shapes do not depend on instructions beyond sm_80, so a device without a table of its own runs
    the one whose shared memory fits: an RTX 3090 (sm_86) has the 99 KiB of sm_89, not the 163 KiB
    of sm_80.
    """
    if capability < (8, 0):
        raise ConfigError(
            "device: cuda needs compute capability 8.0 (A100) or newer, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    fitting = [t for t in hardware_tables() if t.shared_bytes_per_block <= shared_bytes_per_block]
    if not fitting:
        raise ConfigError(
            f"no hardware table fits {shared_bytes_per_block} bytes of shared memory per block"
        )
    older = [table for table in fitting if table.capability <= capability]
    if older:
        return max(older, key=lambda table: table.capability)
    return max(fitting, key=lambda table: table.shared_bytes_per_block)


def merge_kernel(dtype: str, head_dim: int) -> KernelSpec:
    expression = f"tpp_merge<{dtype}, {head_dim}>"
    return KernelSpec(expression, "tpp_merge.cuh", "TppMergeParams", threads=128, max_registers=64)


def rope_append_kernel(dtype: str, head_dim: int) -> KernelSpec:
    return KernelSpec(
        f"rope_append<{dtype}, {head_dim}>",
        "rope_append.cuh",
        "RopeAppendParams",
        threads=256,
        max_registers=64,
    )


def rms_norm_kernel(dtype: str) -> KernelSpec:
    return KernelSpec(
        f"rms_norm<{dtype}>",
        "rms_norm.cuh",
        "RmsNormParams",
        threads=256,
        shared_bytes=32,  # one float per warp
        max_registers=64,
    )


def silu_and_mul_kernel(dtype: str) -> KernelSpec:
    return KernelSpec(
        f"silu_and_mul<{dtype}>",
        "silu_and_mul.cuh",
        "SiluAndMulParams",
        threads=256,
        max_registers=64,
    )


def copy_chunks_kernel() -> KernelSpec:
    return KernelSpec(
        "copy_chunks<2>", "copy_chunks.cuh", "CopyChunksParams", threads=128, max_registers=64
    )


def draw_tokens_kernel() -> KernelSpec:
    threads, bins = 512, 16
    shared = 8 * (bins * threads + threads + bins) + 8 * (threads // 32)
    return KernelSpec(
        "draw_tokens",
        "draw_tokens.cuh",
        "DrawTokensParams",
        threads=threads,
        shared_bytes=shared,
        max_registers=96,
    )


def conformance_kernel(dtype: str) -> KernelSpec:
    """The device layer's own check (benchmarks/gpu.py); no op launches it."""
    return KernelSpec(
        f"conformance<{dtype}>",
        "conformance.cuh",
        "ConformanceParams",
        threads=32,
        shared_bytes=1024,
        max_registers=64,
    )


def shipped_kernels(table: HardwareTable) -> list[KernelSpec]:
    """Every specialization the backend can ask for on a device with this table."""
    kernels = [copy_chunks_kernel(), draw_tokens_kernel()]
    for dtype in DTYPES:
        kernels += [rms_norm_kernel(dtype), silu_and_mul_kernel(dtype)]
        for head_dim in HEAD_DIMS:
            kernels += [rope_append_kernel(dtype, head_dim), merge_kernel(dtype, head_dim)]
            for tile in table.tiles[head_dim]:
                kernels += [tile.kernel(dtype), tile.kernel(dtype, bounded=True)]
    return kernels
