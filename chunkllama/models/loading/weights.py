"""From a checkpoint to tensors: mapped where the bytes can be used as they are, converted or
stacked where not; and random weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.model import LayerWeights, Linear, ModelWeights
from chunkllama.backends.quantized import QuantizedLinear, TensorRows, WeightRows
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.gguf_rows import GgufRows, file_order
from chunkllama.models.loading.module_rows import ModuleRows
from chunkllama.models.loading.safetensors import BLOCK_BYTES, Checkpoint, is_quantized
from chunkllama.models.rotary import head_order
from chunkllama.models.shard import Shard
from chunkllama.models.tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    LinearTensors,
    NormTensor,
    layer_tensors,
)

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard | None = None,
) -> ModelWeights:
    """The model's weights on ``device`` in ``dtype``; norms with an offset are float32.

    On a CPU, tensors that are neither stacked nor converted stay views of the mapped file.
    Quantized matrices are read by the backend that packs them.

    Args:
        spec: of the whole model.
        shard: the part to keep; each layer is cut when it has been read. None: all of it.
    """
    load = _Loader(checkpoint, spec, dtype, device)
    embedding, embedding_rows = load.matrix(EMBEDDING)
    head: Linear
    if _is_tied(checkpoint, spec):
        head = load.head(embedding, embedding_rows)
    else:
        head = load.head(*load.matrix(HEAD))
    layers = []
    for index in range(spec.num_layers):
        layer = load.layer(index)
        layers.append(layer if shard is None else shard.layer(layer, spec, spec.layer(index)))
    return ModelWeights(
        embedding=embedding,
        layers=layers,
        norm=load.norm(NormTensor(NORM, spec.hidden_size)),
        lm_head=head,
        embedding_rows=embedding_rows,
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
        self._buffer = bytearray(BLOCK_BYTES)

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

    def matrix(self, name: str) -> tuple[torch.Tensor, WeightRows | None]:
        """A matrix; if it is quantized an empty tensor of the model's dtype, and its rows."""
        if self._is_quantized(name):
            return torch.empty(0, dtype=self._dtype), self._rows(name, None)
        return self.stacked(name), None

    def head(self, weight: torch.Tensor, rows: WeightRows | None) -> Linear:
        return Linear(weight) if rows is None else QuantizedLinear(weight, parts=(rows,))

    def linear(self, source: LinearTensors) -> Linear:
        names = [name for name, _ in source.parts]
        bias = self.stacked(*(f"{name}.bias" for name in names)) if source.bias else None
        if bias is not None:
            bias = self._in_order(bias, source.rotary_heads)
        weights = [f"{name}.weight" for name in names]
        if any(self._is_quantized(name) for name in weights):
            total = sum(rows for _, rows in source.parts)
            order = row_order(self._head_order, total, source.rotary_heads)
            parts, first = [], 0
            for name, (_, rows) in zip(weights, source.parts, strict=True):
                # Heads are whole within a part.
                own = None if order is None else order[first : first + rows] - first
                parts.append(self._rows(name, own))
                first += rows
            return QuantizedLinear(torch.empty(0, dtype=self._dtype), bias, parts=tuple(parts))
        return Linear(self._in_order(self.stacked(*weights), source.rotary_heads), bias)

    def _is_quantized(self, name: str) -> bool:
        is_module = self._checkpoint.module(name.removesuffix(".weight")) is not None
        return is_module or is_quantized(self._checkpoint[name])

    def _rows(self, name: str, order: NDArray[np.int64] | None) -> WeightRows:
        """Rows of one matrix; ``order``: row of the checkpoint's matrix for each of them."""
        if module := self._checkpoint.module(name.removesuffix(".weight")):
            return ModuleRows(module, order)
        info = self._checkpoint[name]
        if not is_quantized(info):
            weight = self.stacked(name)
            return TensorRows(weight if order is None else weight[torch.from_numpy(order)])
        in_file = file_order(info)
        if in_file is not None:
            order = in_file if order is None else in_file[order]
        return GgufRows(info, order)

    def _in_order(self, rows: torch.Tensor, rotary_heads: int) -> torch.Tensor:
        order = row_order(self._head_order, len(rows), rotary_heads)
        return rows if order is None else rows[torch.from_numpy(order).to(rows.device)]

    def stacked(self, *names: str) -> torch.Tensor:
        """One tensor, or several stacked along their first dimension."""
        infos = [self._checkpoint[name] for name in names]
        dtypes = {TORCH_DTYPES[info.dtype] for info in infos}
        orders = [file_order(info) for info in infos]
        is_plain = len(names) == 1 and dtypes == {self._dtype} and orders[0] is None
        if is_plain and self._device.type == "cpu":
            return self._map(names[0])
        rows = sum(info.shape[0] for info in infos)
        stacked = torch.empty(rows, *infos[0].shape[1:], dtype=self._dtype, device=self._device)
        flat, begin, first = stacked.view(-1), 0, 0
        for name, info, order in zip(names, infos, orders, strict=True):
            for block in self._checkpoint.blocks(name, self._buffer):
                values = torch.frombuffer(block, dtype=TORCH_DTYPES[info.dtype])
                flat[begin : begin + len(values)].copy_(values)
                begin += len(values)
            if order is not None:
                own = stacked[first : first + len(order)]
                own.copy_(own[torch.from_numpy(order).to(own.device)])
            first += info.shape[0]
        return stacked

    def _map(self, name: str) -> torch.Tensor:
        info = self._checkpoint[name]
        flat = torch.frombuffer(
            self._checkpoint.map(name),
            dtype=TORCH_DTYPES[info.dtype],
            count=math.prod(info.shape),
            offset=info.begin,
        )
        return flat.view(info.shape)


def row_order(
    head_order: Sequence[int] | None, rows: int, rotary_heads: int
) -> NDArray[np.int64] | None:
    """Row of the checkpoint for each row, the first heads in the order of ``head_order``."""
    if not rotary_heads or head_order is None:
        return None
    head = np.array(head_order)
    order = np.arange(rows)
    starts = np.arange(rotary_heads) * len(head)
    order[: rotary_heads * len(head)] = (starts[:, None] + head).reshape(-1)
    return order


def random_weights(
    spec: ModelSpec,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelWeights:
    """Random weights that are a pure function of ``spec`` and ``seed`` on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(mean: float, deviation: float, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator).mul_(deviation)
        return values.add_(mean).to(device, dtype)

    return _drawn_weights(spec, draw)


def dummy_weights(
    spec: ModelSpec,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard | None = None,
) -> ModelWeights:
    """Random weights that are drawn on the device, in ``dtype``: a function of ``spec``, ``seed``
    and the kind of device.

    Args:
        spec: of the whole model.
        shard: the part to keep; each layer is cut when it has been drawn. None: all of it.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(mean: float, deviation: float, *shape: int) -> torch.Tensor:
        reach = 3**0.5 * deviation
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.uniform_(mean - reach, mean + reach, generator=generator)

    return _drawn_weights(spec, draw, shard)


def _drawn_weights(
    spec: ModelSpec, draw: Callable[..., torch.Tensor], shard: Shard | None = None
) -> ModelWeights:
    """Weights of ``draw(mean, deviation, *shape)``.

    Matrices are scaled by 1/sqrt(fan-in): activations and logits keep a spread of about one.
    """

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return draw(0.0, columns**-0.5, rows, columns)

    def linear(source: LinearTensors) -> Linear:
        rows = sum(count for _, count in source.parts)
        bias = draw(0.0, 0.1, rows) if source.bias else None
        return Linear(matrix(rows, source.columns), bias)

    def norm(source: NormTensor) -> torch.Tensor:
        weight = draw(1.0, 0.1, source.size)
        return weight.float() if spec.norm_offset else weight

    def layer(index: int) -> LayerWeights:
        tensors = layer_tensors(spec, index)
        made: dict[str, Linear | torch.Tensor | None] = {}
        for item in fields(tensors):
            source = getattr(tensors, item.name)
            if isinstance(source, LinearTensors):
                made[item.name] = linear(source)
            else:
                made[item.name] = None if source is None else norm(source)
        drawn = LayerWeights(**made)  # type: ignore[arg-type]
        return drawn if shard is None else shard.layer(drawn, spec, spec.layer(index))

    embedding = matrix(spec.vocab_size, spec.hidden_size)
    layers = [layer(index) for index in range(spec.num_layers)]
    tied = spec.tie_word_embeddings
    head = embedding if tied else matrix(spec.vocab_size, spec.hidden_size)
    return ModelWeights(embedding, layers, norm(NormTensor(NORM, spec.hidden_size)), Linear(head))
