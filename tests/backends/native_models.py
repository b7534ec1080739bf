"""Small models on the native backend, for its tests."""

from __future__ import annotations

import os

import numpy as np
import torch
from attention_plans import Case

from chunkllama.attention.plan import Planner
from chunkllama.backends.adapter import (
    LINEARS,
    AdapterPart,
    AdapterWeights,
    LinearAdapter,
    LinearName,
)
from chunkllama.backends.base import Backend, DevicePlan
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.model_spec import LayerSpec, ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.llama import Llama
from chunkllama.models.loading.weights import random_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.models.tensors import LinearTensors, layer_tensors

# No size is a multiple of what the kernels pack by.
SPEC = ModelSpec(
    num_layers=2,
    hidden_size=104,
    intermediate_size=200,
    num_qo_heads=9,
    num_kv_heads=3,
    head_dim=32,
    vocab_size=1003,
    max_position=2048,
    layers=(LayerSpec(qkv_bias=True, output_bias=True, mlp_bias=True),),
)
SANITIZER = os.environ.get("CHUNKLLAMA_TEST_SANITIZER", "")


def native_ops(dtype: torch.dtype, level: str) -> CpuBackend:
    return CpuBackend(
        dtype=dtype,
        head_dim=SPEC.head_dim,
        num_kv_heads=SPEC.num_kv_heads,
        level=level,
        sanitizer=SANITIZER,
    )


def make_model(
    backend: Backend, spec: ModelSpec, case: Case, dtype: torch.dtype, *, is_int8: bool = False
) -> tuple[Llama, DevicePlan]:
    """The model, and the plan of a step in which all earlier K/V are zero."""
    kv = backend.allocate_kv(
        num_layers=spec.num_layers,
        num_chunks=case.num_chunks,
        chunk_size=64,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        is_int8=is_int8,
    )
    for layer in kv.layers:
        layer.zero_()
    packing = backend.packing(
        num_qo_heads=spec.num_qo_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
    )
    heads, scale = spec.num_qo_heads, spec.head_dim**-0.5
    attention = Attention(backend, kv, Planner(packing, 64), heads, scale)
    rotary = rotary_tables(spec, spec.max_position)
    model = Llama(spec, random_weights(spec, 0, dtype), attention, rotary)
    return model, backend.upload_plan(case.plan(packing), kv, num_qo_heads=heads)


def random_adapter(
    spec: ModelSpec, rng: np.random.Generator, names: tuple[str, ...], ranks: tuple[int, ...]
) -> AdapterWeights:
    """An adapter of some modules; a rank for each of them, again from the first in each layer."""

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, scale, (rows, columns)).astype(np.float32))

    def linear(source: LinearTensors) -> LinearAdapter | None:
        stacked, parts, first, offset = [], [], 0, 0
        for number, (name, rows) in enumerate(source.parts):
            if name.rpartition(".")[2] in names:
                rank = ranks[number % len(ranks)]
                stacked.append(matrix(rank, source.columns, source.columns**-0.5))
                parts.append(AdapterPart(first, offset, matrix(rows, rank, 0.3 * rank**-0.5)))
                offset += rank
            first += rows
        return LinearAdapter(torch.cat(stacked), tuple(parts)) if parts else None

    layers: list[dict[LinearName, LinearAdapter]] = []
    for index in range(spec.num_layers):
        tensors = layer_tensors(spec, index)
        found = {name: linear(getattr(tensors, name)) for name in LINEARS}
        layers.append({name: each for name, each in found.items() if each is not None})
    return AdapterWeights(tuple(layers))
