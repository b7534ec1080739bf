"""What a configuration makes of a model and this machine's memory, before a weight is read.

Imports torch only where a GPU may be used: the API process refuses bad settings with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from chunkllama.backends.choice import check_choice
from chunkllama.backends.cpu.build import available_levels
from chunkllama.config import EngineConfig
from chunkllama.engine.draft_size import DraftSize, plan_draft
from chunkllama.engine.rank_checks import check_ranks, rank_device
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import kv_bytes_per_chunk, read_spec, resolve_dtype
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.shapes import open_checkpoint
from chunkllama.models.loading.sizes import allocated_bytes
from chunkllama.resources import (
    check_threads,
    default_kv_cache_memory,
    memory_left,
    memory_limit,
)
from chunkllama.scheduler.admission import longest_request

_DEVICE_FILES = ("nvidiactl", "nvidia0", "dxg", "nvmap", "nvhost-ctrl", "kfd")
# A shape of requests, as systems with long prompts have them: what fits is logged.
_SHARED_TOKENS, _OWN_TOKENS = 2048, 512


@dataclass(frozen=True, slots=True)
class EngineSize:
    """What a configuration makes of a model and this machine's memory.

    Attributes:
        dtype, kv_dtype: that the model computes in, and that K/V are stored in.
        weight_bytes, pool_bytes: memory of the weights and of the chunk pool, of all ranks.
        max_model_len: longest prompt plus answer in tokens that the model is served with.
        max_request_tokens: the same, cut to what the whole pool holds.
        longest_requests: how many requests of that length run at once.
        is_pool_given: whether a setting says how large the pool is.
        note: why ``max_model_len`` is below the model's own; "" if it is not.
        draft: the draft model, whose memory is counted in both; None without one.
    """

    spec: ModelSpec
    device: str
    dtype: str
    kv_dtype: str
    max_model_len: int
    weight_bytes: int
    num_chunks: int
    pool_bytes: int
    max_request_tokens: int
    longest_requests: int
    is_pool_given: bool
    note: str
    draft: DraftSize | None

    def with_chunks(self, num_chunks: int, config: EngineConfig) -> EngineSize:
        """The same with another pool."""
        chunk_size = config.cache.chunk_size
        longest = longest_request(self.max_model_len, num_chunks * chunk_size)
        # The last token of an answer has no K/V.
        each = -(-max(longest - 1, 1) // chunk_size)
        return replace(
            self,
            num_chunks=num_chunks,
            pool_bytes=num_chunks * chunk_bytes(self.spec, chunk_size, self.kv_dtype, self.draft),
            max_request_tokens=longest,
            longest_requests=min(num_chunks // each, config.scheduler.max_num_seqs),
        )

    def beside_draft(self, num_chunks: int, chunk_size: int) -> int:
        """Chunks that both pools have where only the model is loaded and so many of its own fit."""
        if self.draft is None:
            return num_chunks
        own = kv_bytes_per_chunk(self.spec, chunk_size, self.kv_dtype)
        left = num_chunks * own - self.draft.weight_bytes
        return left // chunk_bytes(self.spec, chunk_size, self.kv_dtype, self.draft)

    def requests_that_fit(self, chunk_size: int) -> str:
        """Say how many requests of a shape the pool holds, with a shared prompt and without."""
        own = max(min(_OWN_TOKENS, self.max_model_len // 2), 1)
        shared = min(_SHARED_TOKENS, self.max_model_len - own) // chunk_size
        each = -(-own // chunk_size)
        together = max(self.num_chunks - shared, 0) // each
        return (
            f"{self.num_chunks * chunk_size} tokens hold {together} requests of {own} tokens "
            f"behind {shared * chunk_size} that all share, "
            f"{self.num_chunks // (shared + each)} without sharing"
        )


def chunk_bytes(spec: ModelSpec, chunk_size: int, kv_dtype: str, draft: DraftSize | None) -> int:
    """Bytes of a chunk of the pool, and of one of the draft model's, which has as many."""
    own = kv_bytes_per_chunk(spec, chunk_size, kv_dtype)
    return own if draft is None else own + draft.chunk_bytes


def may_have_gpu(folder: Path = Path("/dev")) -> bool:
    """Return whether a driver's device file is there; without one torch finds no GPU either."""
    return any((folder / name).exists() for name in _DEVICE_FILES)


def find_device(wanted: str) -> str:
    """Return "cpu", "cuda" or "cuda:N" for a setting; imports torch where only torch can tell.

    Raises:
        ConfigError: a GPU was asked for that is not there.
    """
    if wanted != "cpu" and may_have_gpu():
        import torch

        from chunkllama.backends.select import check_cuda_device

        if torch.cuda.is_available():
            device = "cuda" if wanted == "auto" else wanted
            check_cuda_device(torch.device(device))
            return device
    if wanted not in ("auto", "cpu"):
        raise ConfigError(f"device: {wanted} was asked for, but there is no CUDA device; use cpu")
    return "cpu"


def plan_size(
    config: EngineConfig,
    folder: Path,
    spec: ModelSpec | None = None,
    checkpoint: Checkpoint | None = None,
) -> EngineSize:
    """Read a model folder's headers and size the pool; loads no weights.

    Args:
        spec, checkpoint: of the folder, where the caller has read them.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.
    """
    spec = spec or read_spec(folder)
    device = find_device(config.model.device)
    if device == "cpu":
        check_threads(config.model.threads, config.model.cpu_bind)
    check_choice(
        device=device,
        backend=config.model.backend,
        isa_level=config.model.isa_level,
        chunk_size=config.cache.chunk_size,
        quantization=config.model.quantization,
        kv_dtype=config.cache.kv_dtype,
        deterministic=config.model.deterministic,
        levels=[level.name for level in available_levels()],
    )
    if config.model.deterministic:
        _check_deterministic(config, spec)
    _check_tier(config, device)
    dtype = resolve_dtype(spec, config.model.dtype, device, config.model.backend)
    max_model_len, note = _max_model_len(config, spec)
    checkpoint = checkpoint or open_checkpoint(folder, spec, config.model.load_format)
    num_ranks = config.model.tensor_parallel_size
    draft = plan_draft(config, device)
    check_ranks(num_ranks, spec, checkpoint, device)
    weights = allocated_bytes(checkpoint, dtype, config.model.quantization, num_ranks)
    weights += 0 if draft is None else draft.weight_bytes
    if device == "cpu":
        _check_weights(weights, dtype)
    kv_dtype = dtype if config.cache.kv_dtype == "auto" else config.cache.kv_dtype
    per_chunk = chunk_bytes(spec, config.cache.chunk_size, kv_dtype, draft)
    num_chunks = _num_chunks(config, weights, max_model_len, device, per_chunk)
    size = EngineSize(
        spec=spec,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        weight_bytes=weights,
        num_chunks=0,
        pool_bytes=0,
        max_request_tokens=0,
        longest_requests=0,
        is_pool_given=config.cache.num_chunks is not None
        or config.cache.kv_cache_memory is not None,
        note=note,
        draft=draft,
    )
    return size.with_chunks(num_chunks, config)


def check_memory(config: EngineConfig, size: EngineSize) -> None:
    """Refuse a pool or a tier that this machine can never hold; what others use now is ignored.

    Raises:
        ConfigError: with the sizes and the setting to change.
    """
    limit, tier = memory_limit(), config.cache.cache_tier_memory or 0
    # The size of a GPU's pool follows from its free memory.
    used = size.weight_bytes + size.pool_bytes if size.device == "cpu" else 0
    if used > limit:
        key = "kv_cache_memory" if config.cache.num_chunks is None else "num_chunks"
        chunk = size.pool_bytes // size.num_chunks
        raise ConfigError(
            f"{key}: the pool takes {size.pool_bytes >> 20:,} MiB, the weights "
            f"{size.weight_bytes >> 20:,} MiB, and this process may use {limit >> 20:,} "
            f"MiB; num_chunks {max((limit - size.weight_bytes) // chunk, 0):,} would fill it"
        )
    if used + tier > limit:
        raise ConfigError(
            f"cache_tier_memory: {tier >> 20:,} MiB are more than the {limit - used >> 20:,} MiB "
            f"that this process may use{' beside the weights and the pool' if used else ''}; "
            "give less"
        )


def _check_deterministic(config: EngineConfig, spec: ModelSpec) -> None:
    if config.model.tensor_parallel_size > 1:
        raise ConfigError(
            "deterministic: the sums of several ranks depend on the batch; use --tp 1"
        )
    if not spec.is_native:
        raise ConfigError(
            f"deterministic: transformers runs {spec.architecture}, and its sums depend on the "
            "batch; leave it out"
        )


def _check_tier(config: EngineConfig, device: str) -> None:
    cache = config.cache
    if cache.cache_tier_memory is not None and device == "cpu" and cache.cache_tier_bits is None:
        raise ConfigError(
            "cache_tier_memory: on a CPU chunks take as much memory there as in the pool; set "
            "cache_tier_bits too, or give kv_cache_memory more"
        )
    if cache.cache_tier_bits is None:
        return
    if cache.cache_tier_memory is None and cache.cache_tier_dir is None:
        raise ConfigError(
            "cache_tier_bits: there is no tier; set cache_tier_memory or cache_tier_dir"
        )
    if cache.kv_dtype != "auto":
        raise ConfigError(
            f"cache_tier_bits: not available with kv_dtype {cache.kv_dtype}; use auto"
        )
    if config.model.deterministic:
        raise ConfigError(
            "cache_tier_bits: rounded K/V change what deterministic keeps equal; leave it out"
        )


def _check_weights(weights: int, dtype: str) -> None:
    limit = memory_limit()
    if weights > limit:
        raise ConfigError(
            f"model: its weights take {weights >> 20:,} MiB as {dtype}, and this process may use "
            f"{limit >> 20:,} MiB; set quantization int8 or int4, or choose a smaller model"
        )


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> tuple[int, str]:
    """The longest prompt plus answer, and why it is not the model's own length, if it is not."""
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_position:
        raise ConfigError(
            f"max_model_len: {wanted} is above the model's own limit of {spec.max_position}"
        )
    if wanted is not None:
        return wanted, ""
    stretched = [r.original_max_position for r in spec.ropes if r.type in ("longrope", "dynamic")]
    original = min(stretched, default=0)
    if 0 < original < spec.max_position:
        return original, (
            f"max_model_len: {original}, the length up to which the model's rotary embedding is "
            f"not stretched; set it (up to {spec.max_position}) to stretch it for all requests"
        )
    return spec.max_position, ""


def _num_chunks(
    config: EngineConfig, weights: int, max_model_len: int, device: str, per_chunk: int
) -> int:
    """Chunks as asked for, or as many of so many bytes as the memory given to the pool holds."""
    if config.cache.num_chunks is not None:
        return config.cache.num_chunks
    memory = config.cache.kv_cache_memory
    if memory is None:
        if device == "cpu":
            longest = -(-max_model_len // config.cache.chunk_size) * per_chunk
            useful = config.scheduler.max_num_seqs * longest
            memory = default_kv_cache_memory(memory_left() - weights, useful)
        else:
            memory = _gpu_pool_memory(
                device,
                weights,
                config.model.tensor_parallel_size,
                config.cache.gpu_memory_utilization,
            )
    if memory <= 0:
        raise ConfigError(
            f"model: its weights take {weights >> 20:,} MiB, and less is free on {device} now; end "
            "other programs, set quantization int8 or int4, or choose a smaller model"
        )
    if memory < 2 * per_chunk:
        raise ConfigError(
            f"kv_cache_memory: {memory} bytes hold fewer than two chunks of {per_chunk} "
            "bytes; give the process more memory, the pool a larger share of it, or set num_chunks"
        )
    return memory // per_chunk


def _gpu_pool_memory(device: str, weights: int, num_ranks: int, utilization: float) -> int:
    """Most bytes of the pool on all GPUs, before the largest step is known: each has an equal part
    of it, and of the weights."""
    import torch

    devices = [rank_device(device, rank, num_ranks) for rank in range(num_ranks)]
    infos = [torch.cuda.mem_get_info(each) for each in devices]
    left = min(free - total + int(utilization * total) for free, total in infos)
    return num_ranks * left - weights
