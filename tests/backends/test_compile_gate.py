"""Every shipped kernel compiles for every architecture, within its table, without a GPU."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable

import nvrtc
import pytest
from _pytest.mark import ParameterSet
from nvrtc import (
    SHARED_KIB_PER_BLOCK,
    Resources,
    compile_kernels,
    every_kernel,
    library_path,
    table_of,
)

from chunkllama.backends.cuda.source import (
    HEAD_DIMS,
    REGISTERS_PER_SM,
    HardwareTable,
    KernelSpec,
    cuda_source,
    hardware_tables,
    table_for,
)
from chunkllama.errors import ConfigError

TABLES = {table.arch: table for table in hardware_tables()}


def case(arch: str, kernel: KernelSpec) -> ParameterSet:
    """Tiles for windows and soft caps are compiled at night, but for one that nearly spills."""
    is_bounded = kernel.expression.endswith("true>>")
    at_night = is_bounded and not (arch == "sm_90" and "<bf16, 256, 1, 1" in kernel.expression)
    marks = (pytest.mark.nightly,) if at_night else ()
    name = f"{arch}-{kernel.expression.replace(' ', '')}"
    return pytest.param(arch, kernel, id=name, marks=marks)


SHIPPED = [case(arch, kernel) for arch, table in TABLES.items() for kernel in every_kernel(table)]
# CUDA programming guide, "Technical Specifications per Compute Capability".
SHARED_BYTES_PER_SM = {"sm_80": 164 << 10, "sm_89": 100 << 10, "sm_90": 228 << 10}
SYSTEM_SHARED_BYTES = 1024  # of every CTA


@functools.cache
def compiled(arch: str, kernel: KernelSpec) -> Resources:
    if library_path() is None:
        pytest.skip("the nvidia-cuda-nvrtc wheel is not installed (extra dev)")
    return compile_kernels(arch, [kernel])[kernel]


@pytest.mark.parametrize(("arch", "kernel"), SHIPPED)
def test_compile_gate(
    arch: str, kernel: KernelSpec, record_property: Callable[[str, object], None]
) -> None:
    """No spills; registers and shared memory within the table. One row each in the summary."""
    resources = compiled(arch, kernel)
    row = (
        f"{arch}  {kernel.expression:<50} {resources.registers:3} of {kernel.max_registers:3} "
        f"registers  {kernel.shared_bytes / 1024:6.1f} KiB  {resources.spilled_bytes} spilled"
    )
    record_property("compile gate", row)
    assert resources.spilled_bytes == 0 and resources.stack_bytes == 0
    assert resources.registers <= kernel.max_registers
    assert kernel.shared_bytes <= TABLES[arch].shared_bytes_per_block


@pytest.mark.nightly
@pytest.mark.parametrize("arch", SHARED_KIB_PER_BLOCK)
@pytest.mark.parametrize("major", [12, 13])
def test_compile_gate_of_both_majors_and_every_architecture(major: int, arch: str) -> None:
    """No spills with what users compile with, on every device that a table serves.

    Each in a process of its own: one process loads one major of NVRTC. Registers are within what
    the occupancy allows by the kernels' launch bounds; the tables' numbers are of major 12.
    """
    if library_path(major) is None:
        pytest.skip(f"no wheel with NVRTC {major} is installed (nvidia-cuda-nvrtc)")
    command = [sys.executable, nvrtc.__file__, str(major), arch]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = {name: Resources(*values) for name, values in json.loads(process.stdout).items()}
    assert found.keys() == {kernel.expression for kernel in every_kernel(table_of(arch))}
    assert {k: r for k, r in found.items() if r.spilled_bytes or r.stack_bytes} == {}


@pytest.mark.parametrize("arch", TABLES)
def test_compile_gate_tables_keep_their_occupancy(arch: str) -> None:
    """A table's limits are the architecture's, and its tiles fit as many CTAs as they claim."""
    table = TABLES[arch]
    assert table.shared_bytes_per_block == SHARED_KIB_PER_BLOCK[arch] << 10
    assert table.shared_bytes_per_sm == SHARED_BYTES_PER_SM[arch]
    assert set(table.tiles) == set(HEAD_DIMS)
    for tile in (tile for tiles in table.tiles.values() for tile in tiles):
        registers = -(-tile.max_registers // 8) * 8 * tile.threads
        assert registers * tile.min_ctas <= REGISTERS_PER_SM, tile
        shared = tile.shared_bytes + SYSTEM_SHARED_BYTES
        assert shared * tile.min_ctas <= table.shared_bytes_per_sm, tile


def test_compile_gate_notices_a_spill() -> None:
    """The gate's own check: a tile that is known to spill is reported as spilling."""
    tile = TABLES["sm_90"].tiles[256][-1]
    spilling = type(tile)(256, 2, 2, 2, 64, 2, 1, 255).kernel("bf16")
    assert compiled("sm_90", spilling).spilled_bytes > 0


@pytest.mark.parametrize("file_name", sorted({kernel.values[1].file_name for kernel in SHIPPED}))
def test_cuda_sources_are_one_text_without_includes(file_name: str) -> None:
    """What NVRTC is given needs no include path, and holds each file once."""
    code = cuda_source(file_name)
    assert "#include" not in code.replace('#include "../emulation/device.h"', "")
    assert "#pragma once" not in code
    assert code.count("struct Element<bf16> {") == 1


@pytest.mark.parametrize(
    ("capability", "shared", "arch"),
    [
        ((8, 0), 166912, "sm_80"),  # A100
        ((8, 6), 101376, "sm_89"),  # RTX 3090: what fits its shared memory
        ((8, 9), 101376, "sm_89"),  # L40S
        ((9, 0), 232448, "sm_90"),  # H200
        ((10, 0), 232448, "sm_90"),  # B200
        ((12, 0), 101376, "sm_89"),  # RTX 5090
    ],
)
def test_every_device_gets_the_newest_table_that_fits(
    capability: tuple[int, int], shared: int, arch: str
) -> None:
    chosen: HardwareTable = table_for(capability, shared)
    assert chosen.arch == arch


def test_devices_without_the_instructions_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"8\.0 \(A100\) or newer, this GPU has 7\.5"):
        table_for((7, 5), 65536)
