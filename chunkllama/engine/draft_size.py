"""What a draft model takes of this machine's memory, before a weight is read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkllama.config import EngineConfig
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import kv_bytes_per_chunk, read_spec, resolve_dtype
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.shapes import open_checkpoint
from chunkllama.models.loading.sizes import allocated_bytes


@dataclass(frozen=True, slots=True)
class DraftSize:
    """A draft model and its memory.

    Attributes:
        folder: of the model.
        dtype: that it computes in.
        weight_bytes: of its weights.
        chunk_bytes: of one chunk of its pool.
    """

    folder: Path
    spec: ModelSpec
    dtype: str
    weight_bytes: int
    chunk_bytes: int


def plan_draft(config: EngineConfig, device: str) -> DraftSize | None:
    """Read the headers of the draft model's folder; None: the configuration names none.

    Raises:
        ConfigError: it cannot be used; one line says why.
    """
    name = config.scheduler.draft_model
    if name is None:
        return None
    if config.scheduler.speculation == "off":
        raise ConfigError("draft_model: needs speculation auto, which is off")
    if config.model.tensor_parallel_size > 1:
        raise ConfigError("draft_model: needs tensor_parallel_size 1")
    try:
        return _planned(config, device, resolve_model(name, "draft_model"))
    except ConfigError as error:
        raise ConfigError(f"draft_model: {str(error).removeprefix('draft_model: ')}") from None


def _planned(config: EngineConfig, device: str, folder: Path) -> DraftSize:
    spec = read_spec(folder)
    if not spec.is_native:
        raise ConfigError(f"needs an architecture of this server, not {spec.architecture}")
    dtype = resolve_dtype(spec, config.model.dtype, device, config.model.backend)
    kv_dtype = dtype if config.cache.kv_dtype == "auto" else config.cache.kv_dtype
    checkpoint = open_checkpoint(folder, spec, config.model.load_format)
    return DraftSize(
        folder,
        spec,
        dtype,
        allocated_bytes(checkpoint, dtype, config.model.quantization),
        kv_bytes_per_chunk(spec, config.cache.chunk_size, kv_dtype),
    )
