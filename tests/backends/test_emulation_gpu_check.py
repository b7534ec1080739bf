"""`benchmarks/gpu.py check` on the emulator, point by point: it must not fail on its first GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from gpu_suite.check import check_points, run_small_cases
from gpu_suite.device import Device
from kernel_emulator import EmulatedLauncher, require_compiler, table

from chunkllama.backends.cuda.launch import Grid
from chunkllama.backends.cuda.source import HardwareTable, KernelSpec, shipped_kernels

Launch = tuple[KernelSpec, Grid, bytes]


@dataclass
class EmulatedDevice:
    """Launches kernels of every dtype and head_dim; ``recorded`` is what a graph would hold."""

    table: HardwareTable = field(default_factory=lambda: table("sm_90"))
    num_sms: int = 4
    recorded: list[Launch] = field(default_factory=list)

    def launch(self, kernel: KernelSpec, grid: Grid, params: bytes) -> None:
        self.recorded.append((kernel, grid, params))
        EmulatedLauncher(self.table).launch(kernel, grid, params)


DEVICE = EmulatedDevice()
POINTS = {
    point.name: point
    for point in check_points(Device(False, torch.device("cpu"), DEVICE))
    if "sanitizer" not in point.name
}
QUICK = ("device layer", "attention 64", "windows, soft caps 64 bf16", "append", "captured")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs of emulated launches: recorded in ``torch.cuda.graph``, run again by replay."""

    class Graph:
        launches: list[Launch]

        def replay(self) -> None:
            for launch in list(self.launches):
                DEVICE.launch(*launch)

    @contextmanager
    def record(graph: Graph) -> Iterator[None]:
        DEVICE.recorded.clear()
        yield
        graph.launches = list(DEVICE.recorded)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.nightly)
        for name in POINTS
    ],
)
def test_emulation_gpu_check(name: str) -> None:
    require_compiler()
    torch.manual_seed(0)
    assert POINTS[name].run()


def test_emulation_sanitizers_see_every_kernel() -> None:
    require_compiler()
    torch.manual_seed(0)
    DEVICE.recorded.clear()
    run_small_cases(Device(False, torch.device("cpu"), DEVICE))
    launched = {kernel.expression.split("<")[0] for kernel, _, _ in DEVICE.recorded}
    assert launched == {k.expression.split("<")[0] for k in shipped_kernels(DEVICE.table)}
