"""Compile kernels for the device and launch them on torch's stream; the only importer of CuPy.

Facts of CuPy 14 that this file relies on: a size-1 void array is passed as its raw bytes (a struct
by value); a launch reads nothing of its stream but ``.ptr``; kernels and torch share the device's
primary context, so torch's pointers are valid in both; compiled modules are cached on disk
(``CUPY_CACHE_DIR``, else ~/.cupy/kernel_cache), keyed by source, options and compiler.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import torch

from chunkllama.backends.cuda.source import (
    COMPILE_OPTIONS,
    HardwareTable,
    KernelSpec,
    cuda_source,
    table_for,
)
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

logger = init_logger(__name__)

Grid = tuple[int, int, int]

# What a kernel may use without asking (CUDA programming guide, "Shared Memory").
_DEFAULT_SHARED_BYTES = 48 * 1024


class Launcher(Protocol):
    """Runs kernels: a GPU through CuPy, or the tests' emulator."""

    table: HardwareTable
    num_sms: int

    def prepare(self, kernels: list[KernelSpec]) -> None:
        """Compile kernels, so that their first launches do not."""
        ...

    def launch(self, kernel: KernelSpec, grid: Grid, params: bytes) -> None:
        """Run ``kernel`` on ``grid`` with the bytes of its parameter struct, in stream order."""
        ...


class _TorchStream:
    """What CuPy reads of a stream: torch's current one, at the time of the launch."""

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        # Private, but without building a Stream object: a microsecond less per launch.
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    @property
    def ptr(self) -> int:
        if self._raw_stream is not None:
            return int(self._raw_stream(self._device_index))
        return int(torch.cuda.current_stream(self._device_index).cuda_stream)


class CupyLauncher:
    """Implements ``Launcher`` with CuPy RawKernels; safe under CUDA graph capture once every kernel
    has been launched before: it then allocates nothing and calls nothing but the launch.

    Args:
        device: a GPU that is there.
        table: tuning to use instead of the architecture's own (``benchmarks/gpu.py tune``).

    Raises:
        ConfigError: no CuPy, one of another CUDA, or a GPU older than the kernels need.
    """

    def __init__(self, device: torch.device, table: HardwareTable | None = None) -> None:
        self._cupy = _import_cupy()
        self.device_index = torch.cuda.current_device() if device.index is None else device.index
        # Any: torch's stubs lack shared_memory_per_block_optin.
        properties: Any = torch.cuda.get_device_properties(self.device_index)
        self.table = table or table_for(
            (properties.major, properties.minor), properties.shared_memory_per_block_optin
        )
        self.num_sms = properties.multi_processor_count
        self._stream = _TorchStream(self.device_index)
        self._functions: dict[str, Any] = {}  # by expression, whose hash str keeps

    def prepare(self, kernels: list[KernelSpec]) -> None:
        started = time.monotonic()
        with torch.cuda.device(self.device_index):
            for kernel in kernels:
                self._function(kernel)
        logger.info("%d kernels compiled in %.1f s", len(kernels), time.monotonic() - started)

    def launch(self, kernel: KernelSpec, grid: Grid, params: bytes) -> None:
        if torch.cuda.current_device() != self.device_index:
            with torch.cuda.device(self.device_index):
                self.launch(kernel, grid, params)
            return
        function = self._function(kernel)
        struct = np.frombuffer(params, dtype=f"V{len(params)}")
        function(
            grid,
            (kernel.threads, 1, 1),
            (struct,),
            shared_mem=kernel.shared_bytes,
            stream=self._stream,
        )

    def resources(self, kernel: KernelSpec) -> tuple[int, int]:
        """Registers per thread and bytes of local memory (spills) of a compiled kernel."""
        with torch.cuda.device(self.device_index):
            function = self._function(kernel)
            return int(function.num_regs), int(function.local_size_bytes)

    def _function(self, kernel: KernelSpec) -> Any:
        function = self._functions.get(kernel.expression)
        if function is None:
            function = self._functions[kernel.expression] = self._compile(kernel)
        return function

    def _compile(self, kernel: KernelSpec) -> Any:
        module = self._cupy.RawModule(
            code=cuda_source(kernel.file_name),
            options=COMPILE_OPTIONS,
            name_expressions=[kernel.expression],
        )
        function = module.get_function(kernel.expression)
        if kernel.shared_bytes > _DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = kernel.shared_bytes
        return function


def _import_cupy() -> Any:
    major = (torch.version.cuda or "12").split(".")[0]
    install = f"run: pip install 'chunkllama[cu{major}]'"
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(f"backend: cuda needs CuPy ({error}); {install}") from error
    other = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if other != int(major):
        raise ConfigError(
            f"backend: cuda needs CuPy for CUDA {major}, which torch is built for; the installed "
            f"one is for CUDA {other}; {install}"
        )
    return cupy
