"""From a checkpoint to tensors: mapped where the bytes can be used as they lie, converted or fused
where not; and random weights.
"""

from __future__ import annotations

import math

import torch

from chunkllama.models.config import ModelSpec
from chunkllama.models.layers import LayerWeights, Linear, LlamaWeights
from chunkllama.models.loading.safetensors import Checkpoint

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> LlamaWeights:
    """The model's weights on ``device`` in ``dtype``.

    On a CPU, tensors that are neither fused nor converted stay views of the mapped file.
    """
    load = _Loader(checkpoint, dtype, device)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=load(f"{prefix}.input_layernorm.weight"),
            qkv=load.linear([f"{attention}.{name}_proj" for name in "qkv"], spec.attention_bias),
            output=load.linear([f"{attention}.o_proj"], spec.attention_bias),
            mlp_norm=load(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=load.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], spec.mlp_bias),
            down=load.linear([f"{mlp}.down_proj"], spec.mlp_bias),
        )

    embedding = load("model.embed_tokens.weight")
    return LlamaWeights(
        embedding=embedding,
        layers=[layer(index) for index in range(spec.num_layers)],
        norm=load("model.norm.weight"),
        lm_head=embedding if spec.tie_word_embeddings else load("lm_head.weight"),
    )


class _Loader:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def __call__(self, *names: str) -> torch.Tensor:
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

    def linear(self, names: list[str], bias: bool) -> Linear:
        weight = self(*(f"{name}.weight" for name in names))
        return Linear(weight, self(*(f"{name}.bias" for name in names)) if bias else None)

    def _map(self, name: str) -> torch.Tensor:
        info = self._checkpoint[name]
        flat = torch.frombuffer(
            self._checkpoint.map(name),
            dtype=_TORCH_DTYPES[info.dtype],
            count=math.prod(info.shape),
            offset=info.begin,
        )
        return flat.view(info.shape)


def random_llama(
    spec: ModelSpec,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaWeights:
    """Random weights that are a pure function of ``spec`` and ``seed``, whatever the device.

    Matrices are scaled by 1/sqrt(fan-in): activations and logits keep a spread of about one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)
        return values.to(device, dtype)

    def norm() -> torch.Tensor:
        values = 1 + 0.1 * torch.randn(spec.hidden_size, generator=generator)
        return values.to(device, dtype)

    def linear(rows: int, columns: int, bias: bool) -> Linear:
        offset = 0.1 * torch.randn(rows, generator=generator) if bias else None
        return Linear(normal(rows, columns), None if offset is None else offset.to(device, dtype))

    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    embedding = normal(spec.vocab_size, hidden)
    layers = [
        LayerWeights(
            input_norm=norm(),
            qkv=linear(spec.qkv_size, hidden, spec.attention_bias),
            output=linear(hidden, spec.num_qo_heads * spec.head_dim, spec.attention_bias),
            mlp_norm=norm(),
            gate_up=linear(2 * intermediate, hidden, spec.mlp_bias),
            down=linear(hidden, intermediate, spec.mlp_bias),
        )
        for _ in range(spec.num_layers)
    ]
    head = embedding if spec.tie_word_embeddings else normal(spec.vocab_size, hidden)
    return LlamaWeights(embedding, layers, norm(), head)
