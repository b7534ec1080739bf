"""Choice of the op set, once per device."""

from __future__ import annotations

from typing import Literal

import torch

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.ops.op_set import OpSet
from chunkllama.ops.reference import ReferenceOps

Backend = Literal["auto", "reference", "native", "cuda"]

logger = init_logger(__name__)


def select_op_set(
    device: str,
    *,
    dtype: torch.dtype,
    head_dim: int,
    chunk_size: int,
    num_kv_heads: int,
    backend: Backend = "auto",
) -> OpSet:
    """The op set for a device ("cpu", "cuda", "cuda:1") and a model's shape.

    "auto" takes ``cuda`` on a GPU, and on a CPU ``native``, or where that is not built or lacks the
    shape the ``reference``, saying so once in the log.

    Raises:
        ConfigError: the backend is not installed, or lacks the device, dtype, head_dim or chunk
            size; the message names it and the fix.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device: {device!r} is not one of cpu, cuda, cuda:N")
    target = torch.device(device)
    if backend == "auto" and target.type == "cpu":
        try:
            return _native(target, dtype, head_dim, chunk_size, num_kv_heads)
        except ConfigError as error:
            logger.warning("running on the torch reference ops, which are slower: %s", error)
            backend = "reference"
    if backend == "native":
        return _native(target, dtype, head_dim, chunk_size, num_kv_heads)
    if backend == "reference":
        return _checked(ReferenceOps(target), chunk_size)
    return _cuda(target, dtype, head_dim, chunk_size, num_kv_heads)


def _native(
    device: torch.device, dtype: torch.dtype, head_dim: int, chunk_size: int, num_kv_heads: int
) -> OpSet:
    if device.type != "cpu":
        raise ConfigError(f"op_set: native runs on device cpu, not on {device}")
    from chunkllama.ops.native import NativeOps

    ops = NativeOps(dtype=dtype, head_dim=head_dim, num_kv_heads=num_kv_heads)
    return _checked(ops, chunk_size)


def _cuda(
    device: torch.device, dtype: torch.dtype, head_dim: int, chunk_size: int, num_kv_heads: int
) -> OpSet:
    if device.type != "cuda":
        raise ConfigError(f"op_set: cuda needs device cuda, not {device}")
    from chunkllama.ops.cuda import CudaOps

    ops = CudaOps(device, dtype=dtype, head_dim=head_dim, num_kv_heads=num_kv_heads)
    return _checked(ops, chunk_size)


def _checked(op_set: OpSet, chunk_size: int) -> OpSet:
    if chunk_size not in op_set.chunk_sizes:
        sizes = ", ".join(map(str, op_set.chunk_sizes))
        raise ConfigError(f"chunk_size: {chunk_size} is not one of {sizes} ({op_set.name} ops)")
    return op_set
