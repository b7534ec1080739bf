"""From a checkpoint to tensors: mapped where the bytes can be used as they are, converted or
stacked where not; and random weights.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch

from chunkllama.backends.model import LayerWeights, Linear, ModelWeights
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.rotary import head_order
from chunkllama.models.tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    LinearTensors,
    NormTensor,
    layer_tensors,
)

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """The model's weights on ``device`` in ``dtype``; norms with an offset are float32.

    On a CPU, tensors that are neither stacked nor converted stay views of the mapped file.
    """
    load = _Loader(checkpoint, spec, dtype, device)
    embedding = load.stacked(EMBEDDING)
    head = embedding if _is_tied(checkpoint, spec) else load.stacked(HEAD)
    return ModelWeights(
        embedding=embedding,
        layers=[load.layer(index) for index in range(spec.num_layers)],
        norm=load.norm(NormTensor(NORM, spec.hidden_size)),
        lm_head=Linear(head),
    )


def _is_tied(checkpoint: Checkpoint, spec: ModelSpec) -> bool:
    """Whether the head is the embedding: a file may say so and still hold a head of its own, after
    fine-tuning of the head alone. It is used if it differs.
    """
    if not spec.tie_word_embeddings:
        return False
    return HEAD not in checkpoint or checkpoint.are_equal(HEAD, EMBEDDING)


class _Loader:
    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._head_order = head_order(spec.ropes[0], spec.head_dim)

    def layer(self, index: int) -> LayerWeights:
        tensors = layer_tensors(self._spec, index)
        loaded: dict[str, Linear | torch.Tensor | None] = {}
        for item in fields(tensors):
            source = getattr(tensors, item.name)
            if isinstance(source, LinearTensors):
                loaded[item.name] = self.linear(source)
            else:
                loaded[item.name] = None if source is None else self.norm(source)
        return LayerWeights(**loaded)  # type: ignore[arg-type]

    def norm(self, source: NormTensor) -> torch.Tensor:
        weight = self._in_order(self.stacked(source.name), source.rotary_heads)
        offset = self._spec.norm_offset
        return weight.float() + offset if offset else weight

    def linear(self, source: LinearTensors) -> Linear:
        names = [name for name, _ in source.parts]
        weight = self.stacked(*(f"{name}.weight" for name in names))
        bias = self.stacked(*(f"{name}.bias" for name in names)) if source.bias else None
        return Linear(
            self._in_order(weight, source.rotary_heads),
            None if bias is None else self._in_order(bias, source.rotary_heads),
        )

    def _in_order(self, rows: torch.Tensor, rotary_heads: int) -> torch.Tensor:
        """Reorder the dimensions of the first heads as ``head_order`` says."""
        if not rotary_heads or self._head_order is None:
            return rows
        order = torch.tensor(self._head_order, device=rows.device)
        starts = torch.arange(rotary_heads, device=rows.device) * len(order)
        index = torch.arange(len(rows), device=rows.device)
        index[: rotary_heads * len(order)] = (starts[:, None] + order).view(-1)
        return rows[index]

    def stacked(self, *names: str) -> torch.Tensor:
        """One tensor, or several stacked along their first dimension."""
        infos = [self._checkpoint[name] for name in names]
        dtypes = {_TORCH_DTYPES[info.dtype] for info in infos}
        if len(names) == 1 and dtypes == {self._dtype} and self._device.type == "cpu":
            return self._map(names[0])
        rows = sum(info.shape[0] for info in infos)
        stacked = torch.empty(rows, *infos[0].shape[1:], dtype=self._dtype, device=self._device)
        flat, begin = stacked.view(-1), 0
        for name, info in zip(names, infos, strict=True):
            for block in self._checkpoint.blocks(name):
                values = torch.frombuffer(block, dtype=_TORCH_DTYPES[info.dtype])
                flat[begin : begin + len(values)].copy_(values)
                begin += len(values)
        return stacked

    def _map(self, name: str) -> torch.Tensor:
        info = self._checkpoint[name]
        flat = torch.frombuffer(
            self._checkpoint.map(name),
            dtype=_TORCH_DTYPES[info.dtype],
            count=math.prod(info.shape),
            offset=info.begin,
        )
        return flat.view(info.shape)


def random_weights(
    spec: ModelSpec,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Random weights that are a pure function of ``spec`` and ``seed``, whatever the device.

    Matrices are scaled by 1/sqrt(fan-in): activations and logits keep a spread of about one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return normal(rows, columns).mul_(columns**-0.5).to(device, dtype)

    def linear(source: LinearTensors) -> Linear:
        rows = sum(count for _, count in source.parts)
        bias = (0.1 * normal(rows)).to(device, dtype) if source.bias else None
        return Linear(matrix(rows, source.columns), bias)

    def norm(source: NormTensor) -> torch.Tensor:
        return (1 + 0.1 * normal(source.size)).to(device, dtype)

    def layer(index: int) -> LayerWeights:
        tensors = layer_tensors(spec, index)
        made: dict[str, Linear | torch.Tensor | None] = {}
        for item in fields(tensors):
            source = getattr(tensors, item.name)
            if isinstance(source, LinearTensors):
                made[item.name] = linear(source)
            else:
                made[item.name] = None if source is None else norm(source)
        return LayerWeights(**made)  # type: ignore[arg-type]

    embedding = matrix(spec.vocab_size, spec.hidden_size)
    layers = [layer(index) for index in range(spec.num_layers)]
    tied = spec.tie_word_embeddings
    head = embedding if tied else matrix(spec.vocab_size, spec.hidden_size)
    return ModelWeights(embedding, layers, norm(NormTensor(NORM, spec.hidden_size)), Linear(head))
