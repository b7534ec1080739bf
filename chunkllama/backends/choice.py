"""Rules by which device, backend, instruction set and chunk size exclude each other; no torch.

A server checks them before it starts an engine process, so that a bad setting is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunkllama.errors import ConfigError

# Of the native kernels; the reference backend has every size that a setting may name.
NATIVE_CHUNK_SIZES = (64,)


def check_choice(
    *,
    device: str,
    backend: str,
    isa_level: str,
    chunk_size: int | None = None,
    quantization: str = "auto",
    kv_dtype: str = "auto",
    deterministic: bool = False,
    levels: Sequence[str] | None = None,
) -> None:
    """Refuse a backend that lacks what the other settings or the model ask for.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        backend: "auto" or the name of one.
        isa_level: "auto" or the name of a level.
        chunk_size: tokens a chunk holds; None: not checked.
        deterministic: log-probabilities must not depend on the batch.
        levels: names of the levels that this CPU has; None: not checked.

    Raises:
        ConfigError: one line that names the setting and the fix.
    """
    is_cpu = device == "cpu"
    if isa_level != "auto":
        if backend not in ("auto", "cpu") or not is_cpu:
            raise ConfigError(f"isa_level: {isa_level} is for the cpu backend only; use auto")
        if levels is not None and isa_level not in levels:
            raise ConfigError(
                f"isa_level: this CPU lacks {isa_level}; use auto or one of {', '.join(levels)}"
            )
    if backend == "cpu" and not is_cpu:
        raise ConfigError(f"backend: cpu runs on device cpu, not on {device}")
    if backend == "cuda" and is_cpu:
        raise ConfigError(f"backend: cuda needs device cuda, not {device}")
    native = "cpu" if isa_level != "auto" else backend
    if native == "auto":  # on a CPU, auto replaces a backend that lacks the chunk size
        native = "" if is_cpu else "cuda"
    if native in ("cpu", "cuda") and chunk_size not in (None, *NATIVE_CHUNK_SIZES):
        sizes = ", ".join(map(str, NATIVE_CHUNK_SIZES))
        raise ConfigError(f"chunk_size: {chunk_size} is not one of {sizes} ({native} backend)")
    if quantization in ("int8", "int4") and backend == "reference":
        raise ConfigError(
            f"quantization: {quantization} is not available with the reference backend; use auto"
        )
    if kv_dtype != "auto" and not is_cpu:
        raise ConfigError(f"kv_dtype: {kv_dtype} is not available on device {device}; use auto")
    if deterministic and not is_cpu:
        raise ConfigError(
            f"deterministic: not available on device {device}, where sums depend on the batch; use "
            "device cpu"
        )
    if deterministic and backend == "reference":
        raise ConfigError(
            "deterministic: not available with the reference backend, where sums depend on the "
            "batch; use backend cpu"
        )
