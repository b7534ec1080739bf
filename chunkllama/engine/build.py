"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from chunkllama.cache.manager import CacheManager
from chunkllama.config import EngineConfig, parse_weights
from chunkllama.engine.core import EngineCore
from chunkllama.engine.model_runner import load_executor
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineReady
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import kv_bytes_per_chunk, read_spec, resolve_dtype
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.sizes import allocated_bytes
from chunkllama.resources import default_kv_cache_memory, memory_left, usable_threads
from chunkllama.scheduler.admission import longest_request
from chunkllama.scheduler.scheduler import Scheduler, SchedulerLimits

logger = init_logger(__name__)

_GPU_POOL_SHARE = 0.85  # of the device memory left beside the weights; the rest is workspace


@dataclass(frozen=True, slots=True)
class EngineSize:
    """What a configuration makes of a model and this machine's memory.

    Attributes:
        weight_bytes, pool_bytes: memory of the weights and of the chunk pool.
        max_model_len: longest prompt plus answer in tokens that the model is served with.
        max_request_tokens: the same, cut to what the whole pool holds.
        longest_requests: how many requests of that length run at once.
    """

    spec: ModelSpec
    device: str
    dtype: str
    max_model_len: int
    weight_bytes: int
    num_chunks: int
    pool_bytes: int
    max_request_tokens: int
    longest_requests: int


def plan_size(config: EngineConfig, folder: Path) -> EngineSize:
    """Read a model folder's headers and size the pool; loads no weights.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.
    """
    spec = read_spec(folder)
    device = _device(config.model.device)
    dtype = resolve_dtype(spec, config.model.dtype, device, config.model.backend)
    max_model_len = _max_model_len(config, spec)
    chunk_size = config.cache.chunk_size
    weights = allocated_bytes(Checkpoint(folder, spec), dtype, config.model.quantization)
    num_chunks = _num_chunks(config, spec, weights, max_model_len, device, dtype)
    longest = longest_request(max_model_len, num_chunks * chunk_size)
    return EngineSize(
        spec=spec,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        weight_bytes=weights,
        num_chunks=num_chunks,
        pool_bytes=num_chunks * kv_bytes_per_chunk(spec, chunk_size, dtype),
        max_request_tokens=longest,
        # The last token of an answer has no K/V.
        longest_requests=min(
            num_chunks // -(-max(longest - 1, 1) // chunk_size), config.scheduler.max_num_seqs
        ),
    )


def build_engine(config: EngineConfig) -> EngineCore:
    """Load the model, allocate the pool, join scheduler and executor.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.
    """
    started = time.monotonic()
    folder = resolve_model(config.model.model)
    size = plan_size(config, folder)
    spec, device, dtype = size.spec, size.device, size.dtype
    max_model_len, num_chunks = size.max_model_len, size.num_chunks
    if (spec.dtype, dtype, config.model.dtype) == ("float16", "bfloat16", "auto"):
        logger.info("dtype: float16 weights are stored as bfloat16; float32 keeps all their bits")
    chunk_size = config.cache.chunk_size
    if device == "cpu":
        torch.set_num_threads(config.model.threads or usable_threads())
    executor = load_executor(
        model_path=folder,
        device=device,
        dtype=dtype,
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        max_model_len=_table_length(spec, max_model_len, num_chunks * chunk_size),
        isa_level=config.model.isa_level,
        backend=config.model.backend,
        weights=config.model.quantization,
        row_work_share=config.scheduler.row_work_share,
    )
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        policy=config.scheduler.scheduling_policy,
        scored_tokens_per_step=config.scheduler.max_scored_tokens,
        fair_quantum=config.scheduler.fair_quantum,
        tenant_weights=parse_weights(config.scheduler.tenant_weights),
        min_wait_tokens=config.scheduler.min_wait_tokens,
        spare_chunks=executor.spare_chunks,
        eos_token_ids=frozenset(spec.eos_token_ids),
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    cache = CacheManager(
        num_chunks, chunk_size, time.monotonic, history_chunks=config.cache.explain_chunks
    )
    scheduler = Scheduler(limits, cache, time.monotonic)
    info = EngineReady(
        model_name=config.model.model,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=list(spec.eos_token_ids),
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        max_request_tokens=size.max_request_tokens,
        device=device,
        backend=executor.backend.name,
        isa_level=executor.backend.isa_level,
    )
    logger.info(
        "engine ready in %.1f s: %s, %s on %s (%s backend), %d chunks of %d tokens (%d MiB): "
        "requests of up to %d tokens, %d of that length at once",
        time.monotonic() - started,
        config.model.model,
        dtype,
        device,
        f"{info.backend} {info.isa_level}".strip(),
        num_chunks,
        chunk_size,
        size.pool_bytes >> 20,
        size.max_request_tokens,
        size.longest_requests,
    )
    return EngineCore(scheduler, executor, info)


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch finds no CUDA device; use cpu")
    return wanted


def _table_length(spec: ModelSpec, max_model_len: int, pool_tokens: int) -> int:
    """Positions of the rotary table: none beyond the pool occurs, whatever length config.json
    states; only frequencies that depend on the length need all of it."""
    if any(rope.type in ("dynamic", "longrope") for rope in spec.ropes):
        return max_model_len
    return min(max_model_len, pool_tokens)


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_position:
        raise ConfigError(
            f"max_model_len: {wanted} is above the model's own limit of {spec.max_position}"
        )
    if wanted is not None:
        return wanted
    stretched = [r.original_max_position for r in spec.ropes if r.type in ("longrope", "dynamic")]
    original = min(stretched, default=0)
    if 0 < original < spec.max_position:
        logger.warning(
            "max_model_len: %d, the length up to which the model's rotary embedding is not "
            "stretched; set it (up to %d) to stretch it for all requests",
            original,
            spec.max_position,
        )
        return original
    return spec.max_position


def _num_chunks(
    config: EngineConfig,
    spec: ModelSpec,
    weights: int,
    max_model_len: int,
    device: str,
    dtype: str,
) -> int:
    """Chunks as asked for, or as many as the memory given to the pool holds."""
    if config.cache.num_chunks is not None:
        return config.cache.num_chunks
    per_chunk = kv_bytes_per_chunk(spec, config.cache.chunk_size, dtype)
    memory = config.cache.kv_cache_memory
    if memory is None:
        if device == "cpu":
            longest = -(-max_model_len // config.cache.chunk_size) * per_chunk
            useful = config.scheduler.max_num_seqs * longest
            memory = default_kv_cache_memory(memory_left() - weights, useful)
        else:
            memory = int((torch.cuda.mem_get_info()[0] - weights) * _GPU_POOL_SHARE)
    if memory < 2 * per_chunk:
        raise ConfigError(
            f"kv_cache_memory: {max(memory, 0)} bytes hold fewer than two chunks of {per_chunk} "
            "bytes; give the process more memory, the pool a larger share of it, or set num_chunks"
        )
    return memory // per_chunk
