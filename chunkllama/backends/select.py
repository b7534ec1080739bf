"""Choice of the backend, once per device."""

from __future__ import annotations

from typing import Literal

import torch

from chunkllama.backends.base import Backend
from chunkllama.backends.choice import check_choice
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

BackendName = Literal["auto", "reference", "cpu", "cuda"]

logger = init_logger(__name__)


def select_backend(
    device: str,
    *,
    dtype: torch.dtype,
    head_dim: int,
    chunk_size: int,
    num_kv_heads: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
    deterministic: bool = False,
) -> Backend:
    """Choose the backend for a device ("cpu", "cuda", "cuda:1") and a model's shape.

    "auto" takes ``cuda`` on a GPU and ``cpu`` on a CPU, or where that is not installed, not built
    or lacks the shape the ``reference``, saying so once in the log. A named ``isa_level`` is never
    replaced, nor is ``cpu`` if it is to be ``deterministic``, which no other backend is.

    Raises:
        ConfigError: there is no such device or ``isa_level``, or the backend asked for is not
            installed or lacks the dtype, head_dim or chunk size; the message names it and the fix.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device: {device!r} is not one of cpu, cuda, cuda:N")
    target = torch.device(device)
    check_choice(device=device, backend=backend, isa_level=isa_level, deterministic=deterministic)
    if isa_level != "auto" or deterministic:
        level = "" if isa_level == "auto" else isa_level
        shape = dtype, head_dim, chunk_size, num_kv_heads
        return _cpu(target, *shape, level, deterministic=deterministic)
    if target.type == "cuda":
        check_cuda_device(target)
    if backend == "reference":
        return _checked(ReferenceBackend(target), chunk_size)
    native = _cuda if target.type == "cuda" else _cpu
    if backend != "auto":
        return native(target, dtype, head_dim, chunk_size, num_kv_heads)
    try:
        return native(target, dtype, head_dim, chunk_size, num_kv_heads)
    except ConfigError as error:
        logger.warning("using the reference backend (torch), which is slower: %s", error)
        return _checked(ReferenceBackend(target), chunk_size)


def check_cuda_device(device: torch.device) -> None:
    """Refuse a GPU that is not there.

    Raises:
        ConfigError: torch finds no GPU, or fewer than the index says.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {device} was asked for, but there is no CUDA device; use cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device: {device} does not exist, the number of GPUs is {count}")


def _cpu(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    chunk_size: int,
    num_kv_heads: int,
    level: str = "",
    *,
    deterministic: bool = False,
) -> Backend:
    from chunkllama.backends.cpu.backend import CpuBackend

    ops = CpuBackend(
        dtype=dtype,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        level=level,
        deterministic=deterministic,
    )
    return _checked(ops, chunk_size)


def _cuda(
    device: torch.device, dtype: torch.dtype, head_dim: int, chunk_size: int, num_kv_heads: int
) -> Backend:
    from chunkllama.backends.cuda.backend import CudaBackend

    ops = CudaBackend(device, dtype=dtype, head_dim=head_dim, num_kv_heads=num_kv_heads)
    return _checked(ops, chunk_size)


def _checked(backend: Backend, chunk_size: int) -> Backend:
    if chunk_size not in backend.chunk_sizes:
        sizes = ", ".join(map(str, backend.chunk_sizes))
        raise ConfigError(
            f"chunk_size: {chunk_size} is not one of {sizes} ({backend.name} backend)"
        )
    return backend
