"""Implement `tune`: sweep tile shapes and the planner's parameters; write
configs/hardware/<arch>.yaml.

The winner of every (head_dim, rows) is kept as a result; the file is written from all results, with
the old entry where a point has not been measured yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from gpu_suite.device import Device
from gpu_suite.points import Point, Record
from gpu_suite.workload import Step, Workload

from chunkllama.backends.cuda.source import HEAD_DIMS, HardwareTable, TileShape
from chunkllama.resources import data_folder

ROWS = (16, 32, 64)
WAVES, RUN_CHUNKS = (1, 2), (2, 4, 8)
_REGISTERS_PER_SM = 65536
_SYSTEM_SHARED_BYTES = 1024


def candidates(table: HardwareTable, head_dim: int, rows: int) -> Iterator[TileShape]:
    """Yield the shapes of ``rows`` rows the device can run, at the occupancy its memory allows."""
    shapes = {16: ((1, 1, 4), (1, 1, 2)), 32: ((1, 2, 2), (2, 1, 2)), 64: ((1, 4, 1), (2, 2, 2))}
    for (tiles, row_warps, key_warps), tokens, stages in product(shapes[rows], (64, 32), (2, 3, 4)):
        if tokens // key_warps < 16:
            continue
        shape = TileShape(head_dim, tiles, row_warps, key_warps, tokens, stages, 1, 255)
        if shape.shared_bytes > table.shared_bytes_per_block:
            continue
        by_memory = table.shared_bytes_per_sm // (shape.shared_bytes + _SYSTEM_SHARED_BYTES)
        most = min(by_memory, 4)
        for min_ctas in sorted({most, max(1, most - 1)}, reverse=True):
            yield replace(shape, min_ctas=min_ctas)


def tune_points(device: Device) -> list[Point]:
    points = [_tile_point(device, d, rows) for d in (128, 64, 96, 256) for rows in ROWS]
    return [*points, _planner_point(device)]


def _workload(head_dim: int, rows: int) -> Workload:
    """Return a step whose items have that many packed rows: private, or a prefix of 4,096."""
    shape: dict[str, Any] = {"num_qo_heads": 8, "num_kv_heads": 8, "head_dim": head_dim}
    if rows == 16:
        return Workload(64, 0, 2048, **shape)
    return Workload(rows, 16384, 0, **shape)


def _tile_point(device: Device, head_dim: int, rows: int) -> Point:
    def run() -> Record:
        table, times = device.table, {}
        others = [tile for tile in table.tiles[head_dim] if tile.rows != rows]
        workload = _workload(head_dim, rows)
        for shape in candidates(table, head_dim, rows):
            # fp16 takes the same registers; the compile gate checks it.
            registers, spilled = device.launcher.resources(shape.kernel("bf16"))
            if (
                spilled
                or -(-registers // 8) * 8 * shape.threads * shape.min_ctas > _REGISTERS_PER_SM
            ):
                continue
            limit = min(255, -(-registers // 8) * 8)
            chosen = replace(shape, max_registers=limit)
            tiles = tuple(sorted([*others, chosen], key=lambda tile: tile.rows))
            tuned = device.with_table(replace(table, tiles=table.tiles | {head_dim: tiles}))
            times[chosen] = _microseconds(tuned, workload)
        assert times, "no shape fits"
        best = min(times, key=lambda shape: times[shape])
        return {"tile": asdict(best), "us": times[best], "tried": len(times)}

    return Point(f"tile {head_dim} rows {rows}", run)


def _microseconds(device: Device, workload: Workload) -> float:
    layers = min(8, device.layers_beyond_l2(workload.unique_bytes))
    step = Step(workload, device, layers)
    plan = step.upload()
    return device.microseconds(lambda layer: step.attend(plan, layer), layers, seconds=0.1)


def _planner_point(device: Device) -> Point:
    """Choose waves and shortest runs, by the sum of times relative to each workload's best."""

    def run() -> Record:
        workloads = [
            Workload(1, 0, 4096, 32, 8),
            Workload(32, 2048, 512, 32, 8),
            Workload(64, 0, 1024, 32, 8),
            Workload(16, 4096, 64),
        ]
        choices = list(product(WAVES, RUN_CHUNKS))
        times = {
            choice: [_microseconds(_with(device, *choice), workload) for workload in workloads]
            for choice in choices
        }
        best = [min(column) for column in zip(*times.values(), strict=True)]

        def cost(choice: tuple[int, int]) -> float:
            return sum(us / least for us, least in zip(times[choice], best, strict=True))

        waves, run_chunks = min(choices, key=cost)
        return {"waves": waves, "min_run_chunks": run_chunks, "us": times[waves, run_chunks]}

    return Point("planner", run)


def _with(device: Device, waves: int, min_run_chunks: int) -> Device:
    table = replace(device.table, waves=waves, min_run_chunks=min_run_chunks)
    return device.with_table(table)


def write_table(table: HardwareTable, records: list[Record], device: Record) -> str:
    """Write configs/hardware/<arch>.yaml from the results; return the file's name."""
    results = [record["result"] for record in records if "result" in record]
    tuned = {
        (r["tile"]["head_dim"], TileShape(**r["tile"]).rows): r for r in results if "tile" in r
    }
    planner = next((r for r in results if "waves" in r), {})
    head = {
        "notes": f"Tuned on {device['name']} (CUDA {device.get('cuda')}), "
        f"{len(results)} of {len(HEAD_DIMS) * len(ROWS) + 1} points measured; "
        "rewritten by `python benchmarks/gpu.py tune`. Fields: chunkllama/backends/cuda/source.py.",
        "arch": table.arch,
        "shared_bytes_per_block": table.shared_bytes_per_block,
        "shared_bytes_per_sm": table.shared_bytes_per_sm,
        "waves": planner.get("waves", table.waves),
        "min_run_chunks": planner.get("min_run_chunks", table.min_run_chunks),
        "chunk_cost_rows": table.chunk_cost_rows,
        "spare_chunks": table.spare_chunks,
    }
    tiles = [
        tuned[tile.head_dim, tile.rows]["tile"]
        if (tile.head_dim, tile.rows) in tuned
        else asdict(tile)
        for head_dim in HEAD_DIMS
        for tile in table.tiles[head_dim]
    ]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = ",\n".join(f"    {json.dumps(tile)}" for tile in tiles)
    path = data_folder("configs") / "hardware" / f"{table.arch}.yaml"
    path.write_text("{\n" + "\n".join(lines) + '\n  "tiles": [\n' + rows + "\n  ]\n}\n")
    return path.name


def tune_rows(records: list[Record]) -> list[Record]:
    """Print the short table: one line per point."""
    return [
        {"point": record["point"], **record["result"]}
        if "result" in record
        else {"point": record["point"], "error": record["error"]}
        for record in records
    ]
