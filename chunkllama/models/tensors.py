"""The tensors of a model in its files: names, shapes, and which are stacked into one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from chunkllama.model_spec import ModelSpec
from chunkllama.models.architectures import ARCHITECTURES

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class NormTensor:
    """A norm's weight [size]; ``rotary_heads``: it holds so many heads of q or k."""

    name: str
    size: int
    rotary_heads: int = 0


@dataclass(frozen=True, slots=True)
class LinearTensors:
    """A linear layer: modules (name, rows) stacked in order, each [rows, columns].

    ``rotary_heads``: the first so many heads of its rows are rotated.
    """

    parts: tuple[tuple[str, int], ...]
    columns: int
    bias: bool
    rotary_heads: int = 0


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Sources of the fields of ``LayerWeights``, with the same names."""

    input_norm: NormTensor | None
    qkv: LinearTensors
    q_norm: NormTensor | None
    k_norm: NormTensor | None
    output: LinearTensors
    attention_output_norm: NormTensor | None
    mlp_norm: NormTensor | None
    gate_up: LinearTensors
    down: LinearTensors
    mlp_output_norm: NormTensor | None


def layer_tensors(spec: ModelSpec, index: int) -> LayerTensors:
    """The tensors of layer ``index``."""
    layer, names = spec.layer(index), ARCHITECTURES[spec.architecture].names
    prefix = f"model.layers.{index}."
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q_heads, kv_heads = spec.num_qo_heads, spec.num_kv_heads

    def norm(name: str, present: bool) -> NormTensor | None:
        return NormTensor(f"{prefix}{name}.weight", hidden) if present else None

    def head_norm(name: str, heads: int) -> NormTensor | None:
        if layer.qk_norm == "none":
            return None
        count = 1 if layer.qk_norm == "head" else heads
        return NormTensor(f"{prefix}{name}.weight", count * head_dim, rotary_heads=count)

    def linear(
        modules: tuple[str, ...], rows: list[int], columns: int, bias: bool, rotary_heads: int = 0
    ) -> LinearTensors:
        if len(modules) == 1:
            rows = [sum(rows)]
        parts = tuple((prefix + name, size) for name, size in zip(modules, rows, strict=True))
        return LinearTensors(parts, columns, bias, rotary_heads)

    intermediate = [spec.intermediate_size] * (2 if layer.gated else 1)
    return LayerTensors(
        input_norm=norm(names.input_norm, layer.pre_norm),
        qkv=linear(
            names.qkv,
            [count * head_dim for count in (q_heads, kv_heads, kv_heads)],
            hidden,
            layer.qkv_bias,
            rotary_heads=q_heads + kv_heads,
        ),
        q_norm=head_norm(names.q_norm, q_heads),
        k_norm=head_norm(names.k_norm, kv_heads),
        output=linear((names.output,), [hidden], q_heads * head_dim, layer.output_bias),
        attention_output_norm=norm(names.attention_output_norm, layer.post_norm),
        mlp_norm=norm(names.mlp_norm, layer.pre_norm),
        gate_up=linear(names.gate_up, intermediate, hidden, layer.mlp_bias),
        down=linear((names.down,), [hidden], spec.intermediate_size, layer.mlp_bias),
        mlp_output_norm=norm(names.mlp_output_norm, layer.post_norm),
    )


def expected_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the model needs, and its shape."""
    yield EMBEDDING, (spec.vocab_size, spec.hidden_size)
    for index in range(spec.num_layers):
        tensors = layer_tensors(spec, index)
        for source in (getattr(tensors, item.name) for item in fields(tensors)):
            if isinstance(source, NormTensor):
                yield source.name, (source.size,)
            elif isinstance(source, LinearTensors):
                for name, rows in source.parts:
                    yield f"{name}.weight", (rows, source.columns)
                    if source.bias:
                        yield f"{name}.bias", (rows,)
    yield NORM, (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        yield HEAD, (spec.vocab_size, spec.hidden_size)
