"""From a model folder to a model on its backend, with its chunk pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import Activations, KVStorage, Quantization
from chunkllama.backends.model import ModelWeights, RunnableModel
from chunkllama.backends.select import BackendName, select_backend
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.llama import Llama
from chunkllama.models.loading.shapes import open_checkpoint
from chunkllama.models.loading.weights import dummy_weights, load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.models.shard import AllReduce, Shard

if TYPE_CHECKING:
    from chunkllama.models.hf_model import TransformersModel

logger = init_logger(__name__)


def load_step_model(  # noqa: PLR0913
    *,
    model_path: Path,
    spec: ModelSpec,
    device: str,
    dtype: str,
    num_chunks: int,
    chunk_size: int,
    max_model_len: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
    weights: Quantization = "auto",
    int4_activations: Activations = "int8",
    kv_dtype: KVStorage = "auto",
    deterministic: bool = False,
    shard: Shard | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> StepModel:
    """Load a model folder and allocate its pool.

    Args:
        spec, dtype: as ``read_spec`` and ``resolve_dtype`` return them; also with a shard, of the
            whole model.
        max_model_len: positions the rotary table covers.
        backend, isa_level: "auto" or the name of one; levels are the cpu backend's.
        weights, kv_dtype: storage of linear layers and K/V, "auto" or what the backend offers.
        int4_activations: of products of few rows with 4-bit weights.
        deterministic: the numbers of a row must not depend on the other rows.
        shard: the part of the model that this rank has; None: all of it.
        load_format: "auto" reads the weights, "dummy" draws them from ``seed``.

    Raises:
        ConfigError: the folder or a setting is unusable; checked before any weight is read.
    """
    spec = spec.for_length(max_model_len)
    checkpoint = open_checkpoint(model_path, spec, load_format)
    if spec.is_text_part:
        logger.warning("of this multimodal model the text model is served, without images")
    foreign = None
    if not spec.is_native:
        foreign = _transformers_model(model_path, spec, dtype, device, weights)
        spec = foreign.spec.for_length(max_model_len)
    own = spec if shard is None else shard.spec(spec)
    attention = build_attention(
        own,
        device=device,
        dtype=getattr(torch, dtype),
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        backend=backend,
        isa_level=isa_level,
        kv_dtype=kv_dtype,
        deterministic=deterministic,
    )
    if foreign is not None:
        foreign.attach(attention, max_model_len)
        return StepModel(spec, foreign, attention)
    kind, place = getattr(torch, dtype), attention.backend.device
    if load_format == "dummy":
        loaded = dummy_weights(spec, seed, kind, place, shard)
    else:
        loaded = load_weights(checkpoint, spec, kind, place, shard)
    model = build_model(
        own,
        loaded,
        attention,
        max_model_len=max_model_len,
        weights=weights,
        int4_activations=int4_activations,
        all_reduce=None if shard is None else shard.all_reduce,
    )
    return StepModel(spec, model, attention)


def _transformers_model(
    path: Path, spec: ModelSpec, dtype: str, device: str, weights: Quantization
) -> TransformersModel:
    if weights != "auto":
        raise ConfigError(
            f"quantization: {weights} is not available for {spec.architecture}, which transformers "
            "runs; use auto"
        )
    logger.warning(
        "%s is not an architecture of this server: transformers runs it, which is slower, on this "
        "server's attention and prefix cache",
        spec.architecture,
    )
    from chunkllama.models.hf_model import TransformersModel

    return TransformersModel(path, spec, getattr(torch, dtype), torch.device(device))


def build_attention(  # noqa: PLR0913
    spec: ModelSpec,
    *,
    device: str,
    dtype: torch.dtype,
    num_chunks: int,
    chunk_size: int,
    backend: BackendName = "auto",
    isa_level: str = "auto",
    kv_dtype: KVStorage = "auto",
    deterministic: bool = False,
) -> Attention:
    """The backend for the device, its chunk pool and planner."""
    ops = select_backend(
        device,
        dtype=dtype,
        head_dim=spec.head_dim,
        chunk_size=chunk_size,
        num_kv_heads=spec.num_kv_heads,
        backend=backend,
        isa_level=isa_level,
        deterministic=deterministic,
    )
    windows = [layer.window for layer in spec.layers]
    is_bounded = spec.attention_softcap is not None or any(w is not None for w in windows)
    ops.prepare(is_bounded=is_bounded)
    kv = ops.allocate_kv(
        num_layers=spec.num_layers,
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        is_int8=kv_dtype == "int8",
    )
    packing = ops.packing(
        num_qo_heads=spec.num_qo_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
    )
    score = spec.score_scale, spec.attention_softcap
    return Attention(ops, kv, Planner(packing, chunk_size), spec.num_qo_heads, *score, windows)


def build_model(
    spec: ModelSpec,
    loaded: ModelWeights,
    attention: Attention,
    *,
    max_model_len: int,
    weights: Quantization = "auto",
    int4_activations: Activations = "int8",
    all_reduce: AllReduce | None = None,
) -> RunnableModel:
    """The model as the backend runs it best.

    Args:
        all_reduce: see ``Llama``.

    Raises:
        ConfigError: a weight storage that the backend does not offer.
    """
    device = attention.backend.device
    rotary = tuple(table.to(device) for table in rotary_tables(spec, max_model_len))
    model = Llama(spec, loaded, attention, rotary, all_reduce)
    return attention.backend.fuse(model, weights, int4_activations)
