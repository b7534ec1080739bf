"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from chunkllama.cache.manager import CacheManager
from chunkllama.config import EngineConfig
from chunkllama.engine.adapter_cache import AdapterCache
from chunkllama.engine.chunk_io import ChunkIO
from chunkllama.engine.core import EngineCore
from chunkllama.engine.draft_model import DraftModel, check_tokenizers
from chunkllama.engine.draft_size import DraftSize
from chunkllama.engine.load import load_step_model
from chunkllama.engine.model_runner import ModelRunner
from chunkllama.engine.pack_loader import PackLoader
from chunkllama.engine.pool import PROFILE_CHUNKS, CudaMemory, WorstStep, fitting_chunks
from chunkllama.engine.rank_checks import rank_device
from chunkllama.engine.rank_group import RankGroup
from chunkllama.engine.ranks import RankedModel, Ranks, UsePool
from chunkllama.engine.size import EngineSize, check_memory, plan_size
from chunkllama.engine.snapshot import SnapshotKeeper
from chunkllama.engine.step_model import StepModel
from chunkllama.engine.step_size import choose_step_tokens
from chunkllama.engine.tier_files import TierFiles, TierSettings
from chunkllama.engine.tuner import Tuner
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineReady
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import kv_bytes_per_chunk
from chunkllama.models.identity import identify_model
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.shard import Shard
from chunkllama.resources import bind_processors, usable_threads
from chunkllama.scheduler.drafts import MAX_ROWS
from chunkllama.scheduler.scheduler import Scheduler, SchedulerLimits
from chunkllama.tenant_limits import parse_weights

logger = init_logger(__name__)


def build_engine(
    config: EngineConfig, on_lost_rank: Callable[[str], None] = lambda reason: None
) -> EngineCore:
    """Load the model, allocate the pool, join scheduler and executor.

    With several ranks this process is rank 0 and starts the others, which end with the thread that
    calls.

    Args:
        on_lost_rank: called in a thread with the reason when a rank has ended; the next step fails
            in any case.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.
    """
    started = time.monotonic()
    folder = resolve_model(config.model.model)
    size = plan_size(config, folder)
    check_memory(config, size)
    if size.draft is not None:
        check_tokenizers(folder, size.draft.folder)
    if size.note:
        logger.warning("%s", size.note)
    if config.model.dtype == "auto" and size.dtype == "bfloat16" != size.spec.dtype:
        logger.info(
            "dtype: %s weights are stored as bfloat16; float32 keeps all their bits",
            size.spec.dtype,
        )
    step_model, size = _load_all(config, folder, size, on_lost_rank)
    try:
        core = _join(config, folder, size, step_model)
    except BaseException:
        step_model.close()
        raise
    step_model.backend.settle(step_model.kv)  # no request pays for it, and memory in use is known
    logger.info(
        "engine ready in %.1f s: %s, %s on %s (%s backend%s), %d chunks of %d tokens (%d MiB, %s): "
        "requests of up to %d tokens, %d of that length at once",
        time.monotonic() - started,
        config.model.model,
        size.dtype,
        size.device,
        f"{core.info.backend} {core.info.isa_level}".strip(),
        f", {step_model.num_ranks} ranks" if step_model.num_ranks > 1 else "",
        size.num_chunks,
        config.cache.chunk_size,
        size.pool_bytes >> 20,
        size.kv_dtype,
        size.max_request_tokens,
        size.longest_requests,
    )
    logger.info("chunk pool: %s", size.requests_that_fit(config.cache.chunk_size))
    return core


def _join(
    config: EngineConfig, folder: Path, size: EngineSize, step_model: StepModel
) -> EngineCore:
    """Join a scheduler and an executor of a loaded model."""
    spec, device, dtype = size.spec, size.device, size.dtype
    max_model_len, num_chunks = size.max_model_len, size.num_chunks
    chunk_size = config.cache.chunk_size
    executor = ModelRunner(step_model, folder, row_work_share=config.scheduler.row_work_share)
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=_step_tokens(config, size, executor.backend.isa_level),
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        policy=config.scheduler.scheduling_policy,
        scored_tokens_per_step=config.scheduler.max_scored_tokens,
        fair_quantum=config.scheduler.fair_quantum,
        max_tenant_slowdown=config.scheduler.max_tenant_slowdown,
        max_step_seconds=config.scheduler.max_step_seconds,
        tenant_weights=parse_weights(config.scheduler.tenant_weights),
        min_wait_tokens=config.scheduler.min_wait_tokens,
        spare_chunks=step_model.spare_chunks,
        eos_token_ids=frozenset(spec.eos_token_ids),
        speculates=config.scheduler.speculation != "off",
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    cache = CacheManager(
        *(num_chunks, chunk_size, time.monotonic),
        history_chunks=config.cache.explain_chunks,
        reach=step_model.attention.reach,
    )
    scheduler = Scheduler(limits, cache, time.monotonic)
    if size.draft is not None:
        executor.draft_model = _load_draft(config, size, size.draft)
        scheduler.drafts.use_model(executor.draft_model)
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
        dtype=size.dtype,
        kv_dtype=size.kv_dtype,
        is_kv_quantized=size.kv_dtype != size.dtype,
        is_deterministic=config.model.deterministic,
        tier_bits=config.cache.cache_tier_bits or 0,
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
        arithmetic=executor.backend.arithmetic,
        drawn_from=_drawn_from(config, size),
    )
    chunk_io = ChunkIO(executor, identify, max_model_len // chunk_size)
    packs = PackLoader(cache, chunk_io)
    snapshots = SnapshotKeeper(cache, chunk_io, packs)
    tier = None
    if config.cache.cache_tier_dir is not None or config.cache.cache_tier_memory is not None:
        settings = TierSettings(
            *(config.cache.cache_tier_memory or 0, config.cache.cache_tier_dir),
            *(config.cache.cache_tier_bytes, config.cache.cache_tier_bits),
        )
        tier = TierFiles(cache, chunk_io, settings)
    core = EngineCore(scheduler, executor, info, packs, snapshots, adapters=adapters, tier=tier)
    core.idle_work = executor.read_vocabulary
    core.tuner = Tuner(
        folder,
        spec,
        config.model.model,
        max_model_len,
        executor.backend.device,
        config.model.tensor_parallel_size,
        has_weights=config.model.load_format != "dummy",
    )
    return core


def _drawn_from(config: EngineConfig, size: EngineSize) -> str:
    """What dummy weights depend on beside the model's sizes; "" where weights are read."""
    if config.model.load_format != "dummy":
        return ""
    return f"seed {config.model.seed or 0}, {size.dtype} on {size.device.partition(':')[0]}"


def _step_tokens(config: EngineConfig, size: EngineSize, isa_level: str) -> int:
    threads = config.model.tensor_parallel_size * torch.get_num_threads()
    return choose_step_tokens(config, size.spec, size.device, isa_level, threads)


def load_rank(config: EngineConfig, rank: int) -> tuple[StepModel, RankGroup, int | None]:
    """Load the part of a model that a rank other than 0 has; the group is still to be joined.

    Args:
        config: of rank 0, with the folder of the model and the number of chunks.

    Returns:
        The part, the group, and the chunks that fit the rank's GPU; None on a CPU.

    Raises:
        ConfigError: see ``build_engine``.
    """
    folder = Path(config.model.model)
    return _load_part(config, folder, plan_size(config, folder), rank)


def _load_all(
    config: EngineConfig, folder: Path, size: EngineSize, on_lost_rank: Callable[[str], None]
) -> tuple[StepModel, EngineSize]:
    """The whole model, on this rank or on several, and its size with the pool that it has."""
    if config.model.tensor_parallel_size == 1:
        _use_device(config, size.device)
        whole = _load(config, folder, size, size.device)
        fitting = _fitting_chunks(config, size, whole, samples=True)
        size = _with_pool(config, size, [fitting])
        if fitting is not None:
            _allocate_pool(size, whole)
        return whole, size
    model = config.model.model_copy(update={"model": str(folder)})
    cache = config.cache.model_copy(update={"num_chunks": size.num_chunks})
    ranks = Ranks(config.model_copy(update={"model": model, "cache": cache}), on_lost_rank)
    try:
        own, group, fitting = _load_part(config, folder, size, rank=0)
        size = _with_pool(config, size, [fitting, *ranks.loaded()])
        if fitting is not None:
            ranks.tell(UsePool(size.num_chunks))
            _allocate_pool(size, own)
        ranks.join(group)
    except BaseException:
        ranks.kill()
        raise
    return RankedModel(own, ranks), size


def _fitting_chunks(
    config: EngineConfig, size: EngineSize, model: StepModel, *, samples: bool
) -> int | None:
    """Chunks that fit a rank's GPU beside the weights and the largest step; None on a CPU."""
    if size.device == "cpu":
        return None
    device = model.backend.device
    tokens = _step_tokens(config, size, model.backend.isa_level)
    longest = _table_length(size.spec, size.max_model_len, _most_tokens(config, size, str(device)))
    num_guesses = 0 if config.scheduler.speculation == "off" else MAX_ROWS
    step = WorstStep(config.scheduler.max_num_seqs, tokens, longest, num_guesses)
    memory, utilization = CudaMemory(device), config.cache.gpu_memory_utilization
    try:
        fitting = fitting_chunks(model, step, memory, utilization, samples=samples)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"max_num_batched_tokens: {device} lacks memory for a step of {tokens} tokens and "
            f"{step.num_seqs} sequences beside the weights; lower it or max_num_seqs"
        ) from error
    return size.beside_draft(fitting, model.kv.chunk_size)


def _with_pool(config: EngineConfig, size: EngineSize, fitting: list[int | None]) -> EngineSize:
    """The size with the pool that was asked for, or else fits the fullest GPU.

    Raises:
        ConfigError: nothing worth a pool fits.
    """
    counts = [count for count in fitting if count is not None]
    if not counts:
        return size
    most = min(counts)
    utilization = config.cache.gpu_memory_utilization
    if size.is_pool_given:
        if size.num_chunks > most:
            logger.warning(
                "the pool has %d chunks; with gpu_memory_utilization %g %d fit beside the largest "
                "step",
                *(size.num_chunks, utilization, max(most, 0)),
            )
        return size
    if most < 2:
        raise ConfigError(
            f"gpu_memory_utilization: {utilization:g} leaves no memory for the pool beside the "
            "weights and the largest step; raise it, or lower max_num_batched_tokens or "
            "max_num_seqs"
        )
    return size.with_chunks(most, config)


def _allocate_pool(size: EngineSize, model: StepModel) -> None:
    try:
        model.replace_pool(size.num_chunks)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"kv_cache_memory: {model.backend.device} lacks memory for the weights "
            f"({size.weight_bytes >> 20:,} MiB) and the pool ({size.pool_bytes >> 20:,} MiB); set "
            "a smaller one, or end other programs"
        ) from error


def _load_part(
    config: EngineConfig, folder: Path, size: EngineSize, rank: int
) -> tuple[StepModel, RankGroup, int | None]:
    num_ranks = config.model.tensor_parallel_size
    device = rank_device(size.device, rank, num_ranks)
    _use_device(config, device)
    group = RankGroup(rank, num_ranks, torch.device(device))
    shard = Shard(rank, num_ranks, group.all_reduce)
    model = _load(config, folder, size, device, shard)
    return model, group, _fitting_chunks(config, size, model, samples=rank == 0)


def _use_device(config: EngineConfig, device: str) -> None:
    """Choose the processors, of which each rank uses its share, or the GPU."""
    if device == "cpu":
        bind_processors(config.model.cpu_bind)
        threads = config.model.threads or usable_threads()
        torch.set_num_threads(max(threads // config.model.tensor_parallel_size, 1))
    elif ":" in device:
        torch.cuda.set_device(device)  # of pinned memory and streams, which name no device


def _load_draft(config: EngineConfig, size: EngineSize, draft: DraftSize) -> DraftModel:
    """Load the draft model beside the model, with a pool of as many chunks."""
    max_tokens = min(size.max_model_len, draft.spec.max_position)
    planned = replace(size, spec=draft.spec, dtype=draft.dtype, max_model_len=max_tokens)
    step_model = _load(config, draft.folder, planned, size.device)
    if size.device != "cpu":
        try:
            _allocate_pool(size, step_model)
        except BaseException:
            step_model.close()
            raise
    logger.info(
        "draft model %s: %d MiB of weights, %d MiB of K/V",
        config.scheduler.draft_model,
        draft.weight_bytes >> 20,
        size.num_chunks * draft.chunk_bytes >> 20,
    )
    return DraftModel(step_model, max_tokens, size.spec.vocab_size)


def _load(
    config: EngineConfig, folder: Path, size: EngineSize, device: str, shard: Shard | None = None
) -> StepModel:
    most_tokens = _most_tokens(config, size, device)
    try:
        return load_step_model(
            model_path=folder,
            spec=size.spec,
            device=device,
            dtype=size.dtype,
            kv_dtype=config.cache.kv_dtype,
            num_chunks=size.num_chunks if device == "cpu" else PROFILE_CHUNKS,
            chunk_size=config.cache.chunk_size,
            max_model_len=_table_length(size.spec, size.max_model_len, most_tokens),
            isa_level=config.model.isa_level,
            backend=config.model.backend,
            weights=config.model.quantization,
            int4_activations=config.model.int4_activations,
            deterministic=config.model.deterministic,
            shard=shard,
            load_format=config.model.load_format,
            seed=config.model.seed or 0,
        )
    except MemoryError:
        raise ConfigError(
            "not enough memory for the model and the chunk pool; lower --num-chunks"
        ) from None
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"model: {device} lacks memory for the weights ({size.weight_bytes >> 20:,} MiB); set "
            "quantization, or end other programs"
        ) from error


def _most_tokens(config: EngineConfig, size: EngineSize, device: str) -> int:
    """Tokens that no pool exceeds: those of this one, or of a GPU's whole memory."""
    chunk_size = config.cache.chunk_size
    if device == "cpu":
        return size.num_chunks * chunk_size
    memory = config.model.tensor_parallel_size * torch.cuda.mem_get_info(device)[1]
    return memory // kv_bytes_per_chunk(size.spec, chunk_size, size.kv_dtype) * chunk_size


def _table_length(spec: ModelSpec, max_model_len: int, pool_tokens: int) -> int:
    """Positions of the rotary table: none beyond the pool occurs, for any length that config.json
    states; only frequencies that depend on the length need all of it."""
    if any(rope.type in ("dynamic", "longrope") for rope in spec.ropes):
        return max_model_len
    return min(max_model_len, pool_tokens)
