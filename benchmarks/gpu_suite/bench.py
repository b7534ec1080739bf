"""Implement `bench`: compare attention with peers and with sharing disabled."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_suite.device import Device
from gpu_suite.peers import PEERS, flash_per_sequence
from gpu_suite.points import Point, PointTimeout, Record
from gpu_suite.workload import Step, Tree, Workload

GQA = {"num_qo_heads": 32, "num_kv_heads": 8}
# The trees and heads (query, key/value) of PAT's benchmark (ASPLOS 26).
PAT_TREES = (
    *("1,10_4096,416", "1,256_256,32", "1,1024_2048,32", "1,2,64_1024,256,256"),
    *("1,4,256_32,256,32", "1,8,512_32,512,256", "1,8,512_32,2048,256", "1,8,512_512,512,256"),
    *("1,4,8,256_32,256,256,32", "1,4,16,512_1024,256,128,32"),
    *("1,4,16,64,256,1024_256,32,256,64,32,256", "1,16,32,64,128,1024_256,128,64,32,32,32"),
    *("1,16,32,64,256,1024_256,128,64,32,32,32", "1,8,16,32,64,128,1024_256,128,64,32,32,32,32"),
    *("1,8,16,32,64,256,1024_256,128,64,32,32,32,32", "2,8,16,256_256,256,32,32"),
    *("4,16,256,512_512,32,128,32", "8,16,32,256_512,512,256,32", "256_1024", "256_4096"),
)
PAT_HEADS = ((32, 8), (32, 32), (16, 8), (64, 8))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MEMORY_SHARE = 0.8  # of the free memory that a point may take


def bench_points(device: Device) -> list[Point]:
    """Return the points: headlines, then the Table 3 grid, GQA, what cascades lose, PAT's trees,
    batch sweeps, other shapes."""
    headline = Workload(32, 4096, 0)
    points = [_compare(device, headline), _bandwidth(device), _nothing_shared(device)]
    points += [_overhead(device)]
    grid = [Workload(32, ns, nu) for ns in (4096, 2048, 1024) for nu in (512, 0)]
    grid += [Workload(32, ns, nu, **GQA) for ns in (4096, 2048, 1024) for nu in (512, 0)]
    grid += [Tree.of("1,8_4000,3", 8, 1), Tree.of("1,8_4000,64", 8, 1)]
    grid += [Workload(128, ns, 3, **GQA) for ns in (128, 256, 512, 1024, 2048, 4096)]
    grid += [Workload(b, 512, 64, **GQA) for b in BATCHES]
    grid += [Tree.of(tree, *heads) for heads in PAT_HEADS for tree in PAT_TREES]
    for kind in (GQA, {}):
        grid += [Workload(b, 2048, nu, **kind) for nu in (512, 0) for b in BATCHES]
    grid += [
        Workload(32, 2048, nu, num_qo_heads=32, num_kv_heads=8, head_dim=head_dim, dtype=dtype)
        for head_dim, dtype in ((64, "bf16"), (128, "fp16"), (256, "bf16"), (96, "bf16"))
        for nu in (512, 0)
    ]
    seen = {headline.name}
    for workload in grid:
        if workload.name not in seen:
            seen.add(workload.name)
            points.append(_compare(device, workload))
    return points


def _compare(device: Device, workload: Workload) -> Point:
    def run() -> Record:
        layers = device.layers_beyond_l2(workload.unique_bytes)
        step = Step(workload, device, layers)
        plans = {"ours": step.upload(), "ours_unshared": step.upload(sharing=False)}
        times: Record = {}
        for name, plan in plans.items():
            times[name] = _time(device, lambda layer, p=plan: step.attend(p, layer), layers)
        skipped: Record = {}
        for name, build in PEERS.items():
            if name in ("sdpa", "flash") and not _fits(device, workload):
                skipped[name] = "K and V per sequence do not fit the memory"
                continue
            try:
                times[name] = _time(device, build(step), layers)
            except (ImportError, AttributeError, RuntimeError, TypeError, PointTimeout) as error:
                skipped[name] = f"{type(error).__name__}: {str(error)[:200]}"
        ours = times["ours"]
        return {
            "layers": layers,
            "us": times,
            "predicted_us": predicted_microseconds(device, workload),
            "gb_per_s": workload.unique_bytes / ours / 1e3,
            "items": plans["ours"].host.num_items,
            "speedup": {name: value / ours for name, value in times.items() if name != "ours"},
            "skipped": skipped,
        }

    return Point(f"compare {workload.name}", run)


def predicted_microseconds(device: Device, workload: Workload) -> float | None:
    """What ``gpu_model.py`` says of the kernels as they are; None for a GPU whose rates it lacks,
    and for heads of another size."""
    from gpu_model import BUILT, GPUS, layer_seconds

    rates = next((gpu for gpu in GPUS.values() if gpu.arch == device.table.arch), None)
    if rates is None or workload.head_dim != 128:
        return None
    return round(1e6 * layer_seconds(rates, workload, BUILT), 3)


def _time(device: Device, step: Callable[[int], Any], layers: int) -> float:
    return round(device.microseconds(step, layers), 3)


def _fits(device: Device, workload: Workload) -> bool:
    if device.dry:
        return True
    return 3 * workload.unshared_bytes < _MEMORY_SHARE * torch.cuda.mem_get_info()[0]


def _bandwidth(device: Device) -> Point:
    """Compare private tokens with a plain copy, and shared plus private against the two-phase
    roofline: every unique byte once, at the copy's rate.
    """

    def run() -> Record:
        copy = device.copy_bandwidth()
        shares: Record = {"copy_gb_per_s": copy / 1e9}
        for workload in (Workload(64, 0, 2048, **GQA), Workload(32, 4096, 512)):
            layers = device.layers_beyond_l2(workload.unique_bytes)
            step = Step(workload, device, layers)
            plan = step.upload()
            us = device.microseconds(lambda layer, s=step, p=plan: s.attend(p, layer), layers)
            shares[workload.name] = workload.unique_bytes / (1e-6 * us) / copy
        return shares

    return Point("bandwidth of private tokens and of the two phases", run)


def _nothing_shared(device: Device) -> Point:
    """Run 200 paired alternations against flash-decoding where there is nothing to share."""
    workload = Workload(16, 0, 2048, **GQA)

    def run() -> Record:
        layers = device.layers_beyond_l2(workload.unique_bytes)
        step = Step(workload, device, layers)
        plan = step.upload()
        peer = flash_per_sequence(step)
        if device.dry:
            step.attend(plan, 0)
            peer(0)
            return {"pairs": 0}
        ours = device.timer(lambda layer: step.attend(plan, layer), layers)
        theirs = device.timer(peer, layers)
        ratios = sorted(ours(0.0) / theirs(0.0) for _ in range(200))
        return {"pairs": 200, "median": median(ratios), "p5": ratios[10], "p95": ratios[190]}

    return Point(f"nothing shared {workload.name}", run)


def _overhead(device: Device) -> Point:
    """Measure host time of append and attention per layer without graphs, and of a plan."""
    workload = Workload(32, 1024, 64, **GQA)

    def run() -> Record:
        step = Step(workload, device, 1)
        plan = step.upload()

        def layer() -> None:
            step.append(plan, 0)
            step.attend(plan, 0)

        layer()
        # Fewer launches than the queue holds (1,024); a full queue blocks the host.
        count = 1 if device.dry else 200
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            layer()
        launched = time.perf_counter() - begin
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            step.upload()
        planned = time.perf_counter() - begin
        return {
            "launch_us_per_layer": 1e6 * launched / count,
            "plan_us_per_step": 1e6 * planned / count,
        }

    return Point("host overhead", run)


def _synchronize(device: Device) -> None:
    if not device.dry:
        torch.cuda.synchronize()


def bench_rows(records: list[Record]) -> list[dict[str, Any]]:
    """Print the short table: one line per compared workload."""
    return [
        {
            "workload": record["point"].removeprefix("compare "),
            "us": record["result"]["us"]["ours"],
            "predicted": record["result"]["predicted_us"],
            "GB/s": record["result"]["gb_per_s"],
            **{f"x {name}": value for name, value in record["result"]["speedup"].items()},
        }
        for record in records
        if "speedup" in record.get("result", {})
    ]
