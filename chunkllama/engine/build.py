"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from chunkllama.cache.manager import CacheManager
from chunkllama.config import EngineConfig
from chunkllama.engine.adapter_cache import AdapterCache
from chunkllama.engine.chunk_io import ChunkIO
from chunkllama.engine.core import EngineCore
from chunkllama.engine.model_runner import ModelRunner, load_executor
from chunkllama.engine.pack_loader import PackLoader
from chunkllama.engine.size import EngineSize, check_memory, plan_size
from chunkllama.engine.snapshot import SnapshotKeeper
from chunkllama.engine.step_size import choose_step_tokens
from chunkllama.engine.tier_files import TierFiles
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineReady
from chunkllama.model_spec import ModelSpec
from chunkllama.models.identity import identify_model
from chunkllama.models.loading.hub import resolve_model
from chunkllama.resources import bind_processors, usable_threads
from chunkllama.scheduler.scheduler import Scheduler, SchedulerLimits
from chunkllama.tenant_limits import parse_weights

logger = init_logger(__name__)


def build_engine(config: EngineConfig) -> EngineCore:
    """Load the model, allocate the pool, join scheduler and executor.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.
    """
    started = time.monotonic()
    folder = resolve_model(config.model.model)
    size = plan_size(config, folder)
    check_memory(config, size)
    if size.note:
        logger.warning("%s", size.note)
    spec, device, dtype = size.spec, size.device, size.dtype
    max_model_len, num_chunks = size.max_model_len, size.num_chunks
    if config.model.dtype == "auto" and dtype == "bfloat16" != spec.dtype:
        logger.info(
            "dtype: %s weights are stored as bfloat16; float32 keeps all their bits", spec.dtype
        )
    chunk_size = config.cache.chunk_size
    if device == "cpu":
        bind_processors(config.model.cpu_bind)
        torch.set_num_threads(config.model.threads or usable_threads())
    elif ":" in device:
        torch.cuda.set_device(device)  # of pinned memory and streams, which name no device
    executor = _load(config, folder, size)
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=choose_step_tokens(
            config, spec, device, executor.backend.isa_level, torch.get_num_threads()
        ),
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        policy=config.scheduler.scheduling_policy,
        scored_tokens_per_step=config.scheduler.max_scored_tokens,
        fair_quantum=config.scheduler.fair_quantum,
        max_tenant_slowdown=config.scheduler.max_tenant_slowdown,
        max_step_seconds=config.scheduler.max_step_seconds,
        tenant_weights=parse_weights(config.scheduler.tenant_weights),
        min_wait_tokens=config.scheduler.min_wait_tokens,
        spare_chunks=executor.spare_chunks,
        eos_token_ids=frozenset(spec.eos_token_ids),
        speculates=config.scheduler.speculation != "off",
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
        kv_dtype=size.kv_dtype,
        is_kv_quantized=size.kv_dtype != size.dtype,
    )
    logger.info(
        "engine ready in %.1f s: %s, %s on %s (%s backend), %d chunks of %d tokens (%d MiB, %s): "
        "requests of up to %d tokens, %d of that length at once",
        time.monotonic() - started,
        config.model.model,
        dtype,
        device,
        f"{info.backend} {info.isa_level}".strip(),
        num_chunks,
        chunk_size,
        size.pool_bytes >> 20,
        size.kv_dtype,
        size.max_request_tokens,
        size.longest_requests,
    )
    adapters = AdapterCache(executor.adapters, scheduler.adapters, config.cache.adapter_memory)
    identify = partial(
        identify_model,
        folder,
        spec,
        name=config.model.model,
        dtype=dtype,
        kv_dtype=size.kv_dtype,
        quantization=config.model.quantization,
        chunk_size=chunk_size,
        max_model_len=max_model_len,
    )
    chunk_io = ChunkIO(executor, identify, max_model_len // chunk_size)
    packs = PackLoader(cache, chunk_io)
    snapshots = SnapshotKeeper(cache, chunk_io, packs)
    tier = None
    if config.cache.cache_tier_dir is not None:
        tier = TierFiles(
            cache, chunk_io, config.cache.cache_tier_dir, config.cache.cache_tier_bytes
        )
    return EngineCore(scheduler, executor, info, packs, snapshots, adapters=adapters, tier=tier)


def _load(config: EngineConfig, folder: Path, size: EngineSize) -> ModelRunner:
    chunk_size = config.cache.chunk_size
    try:
        return load_executor(
            model_path=folder,
            spec=size.spec,
            device=size.device,
            dtype=size.dtype,
            kv_dtype=config.cache.kv_dtype,
            num_chunks=size.num_chunks,
            chunk_size=chunk_size,
            max_model_len=_table_length(
                size.spec, size.max_model_len, size.num_chunks * chunk_size
            ),
            isa_level=config.model.isa_level,
            backend=config.model.backend,
            weights=config.model.quantization,
            int4_activations=config.model.int4_activations,
            row_work_share=config.scheduler.row_work_share,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"kv_cache_memory: {size.device} lacks memory for the weights "
            f"({size.weight_bytes >> 20:,} MiB) and the pool ({size.pool_bytes >> 20:,} MiB); set "
            "a smaller one, or end other programs"
        ) from error


def _table_length(spec: ModelSpec, max_model_len: int, pool_tokens: int) -> int:
    """Positions of the rotary table: none beyond the pool occurs, for any length that config.json
    states; only frequencies that depend on the length need all of it."""
    if any(rope.type in ("dynamic", "longrope") for rope in spec.ropes):
        return max_model_len
    return min(max_model_len, pool_tokens)
