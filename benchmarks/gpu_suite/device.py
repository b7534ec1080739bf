"""Provide the device under test: a GPU through CuPy, or none for a dry run."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from chunkllama.backends.cuda.backend import CudaBackend
from chunkllama.backends.cuda.launch import CupyLauncher, Grid, Launcher
from chunkllama.backends.cuda.source import (
    PARAMS,
    HardwareTable,
    KernelSpec,
    cuda_source,
    table_for,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class DryLauncher:
    """Check launches without executing them, with the limits of an H200."""

    table: HardwareTable = field(default_factory=lambda: table_for((9, 0), 232448))
    num_sms: int = 132

    def launch(self, kernel: KernelSpec, grid: Grid, params: bytes) -> None:
        assert kernel.expression.split("<")[0] in cuda_source(kernel.file_name)
        assert len(params) == PARAMS[kernel.params].size
        assert min(grid) > 0 and max(grid[1:]) < 1 << 16
        assert kernel.shared_bytes <= self.table.shared_bytes_per_block

    def resources(self, kernel: KernelSpec) -> tuple[int, int]:
        return kernel.max_registers, 0


@dataclass
class Device:
    """Where tensors live and who launches; ``dry``: tensors have no data and nothing runs."""

    dry: bool
    torch_device: torch.device
    launcher: Any

    @classmethod
    def open(cls, dry: bool) -> Device:
        if dry:
            return cls(True, torch.device("meta"), DryLauncher())
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(False, device, CupyLauncher(device))

    def ops(self, head_dim: int, num_kv_heads: int, dtype: str = "bf16") -> CudaBackend:
        launcher: Launcher = self.launcher
        return CudaBackend(
            self.torch_device,
            dtype=DTYPES[dtype],
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            launcher=launcher,
        )

    @property
    def table(self) -> HardwareTable:
        """Return the tuning in use (maybe of another device) with this device's name and limits."""
        table: HardwareTable = self.launcher.table
        if self.dry:
            return table
        properties: Any = torch.cuda.get_device_properties(self.torch_device)
        return replace(
            table,
            arch=f"sm_{properties.major}{properties.minor}",
            shared_bytes_per_block=properties.shared_memory_per_block_optin,
            shared_bytes_per_sm=properties.shared_memory_per_multiprocessor,
        )

    def with_table(self, table: HardwareTable) -> Device:
        """Return the same device with another tuning."""
        if self.dry:
            return replace(self, launcher=DryLauncher(table, self.launcher.num_sms))
        return replace(self, launcher=CupyLauncher(self.torch_device, table))

    def describe(self) -> dict[str, Any]:
        software = {"torch": torch.__version__, "python": platform.python_version()}
        if self.dry:
            return {"name": "dry run", **software}
        import cupy

        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": properties.name,
            "sms": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda,
            "cupy": cupy.__version__,
            **software,
        }

    @property
    def l2_bytes(self) -> int:
        if self.dry:
            return 50 << 20
        properties: Any = torch.cuda.get_device_properties(self.torch_device)
        return int(properties.L2_cache_size)

    def layers_beyond_l2(self, layer_bytes: int) -> int:
        """Return the number of layers whose K/V together exceed the L2 cache."""
        return min(64, max(1, -(-4 * self.l2_bytes // layer_bytes)))

    def lost(self) -> bool:
        """Report whether an error has made the CUDA context unusable for this process."""
        try:
            if not self.dry:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def microseconds(self, step: Callable[[int], Any], layers: int, seconds: float = 0.4) -> float:
        """Return the median time of ``step(layer)`` in a CUDA graph over all layers."""
        if self.dry:
            step(0)
            return float("nan")
        return self.timer(step, layers)(seconds)

    def timer(self, step: Callable[[int], Any], layers: int) -> Callable[[float], float]:
        """Capture the graph; the returned function replays it for some seconds and gives the
        median microseconds per layer.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                step(layer)

        def measure(seconds: float) -> float:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times: list[float] = []
            while not times or (sum(times) < seconds * 1000 and len(times) < 400):
                first.record()
                graph.replay()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last))
            return 1000 * median(times) / layers

        return measure

    def copy_bandwidth(self) -> float:
        """Measure bytes read and written per second by a plain device copy of 2 GiB."""
        if self.dry:
            return float("nan")
        source = torch.empty(2 << 30, dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (1e-6 * self.microseconds(lambda _: target.copy_(source), 1))
