"""The supported architectures: how each reads config.json, and its tensors' names in the file.

An architecture is an entry of ``ARCHITECTURES``; ``models/llama.py`` runs all of them, driven by
the ``ModelSpec`` that the entry makes of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from chunkllama.model_spec import LayerSpec, RopeSpec
from chunkllama.models.config_file import ConfigFile
from chunkllama.models.rope_config import read_rope

LayerPattern = tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Modules of a layer, relative to ``model.layers.N``; several are stacked when loaded."""

    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_output_norm: str = "post_feedforward_layernorm"


def _one_rope(config: ConfigFile, head_dim: int) -> tuple[RopeSpec, ...]:
    return (read_rope(config, head_dim),)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One entry.

    Attributes:
        model_type: names the architecture where config.json has no ``architectures``.
        layers: the pattern of layers, from config.json.
        defaults: what transformers assumes for keys that config.json lacks.
        names: of the tensors.
        fields: further fields of ``ModelSpec``.
        ropes: from config.json and head_dim.
    """

    model_type: str
    layers: Callable[[ConfigFile], LayerPattern]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: LayerNames = LayerNames()
    fields: Callable[[ConfigFile], dict[str, Any]] = lambda config: {}
    ropes: Callable[[ConfigFile, int], tuple[RopeSpec, ...]] = _one_rope


def _llama_layer(config: ConfigFile) -> LayerPattern:
    bias = config.flag("attention_bias")
    return (
        LayerSpec(
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=config.flag("mlp_bias"),
            activation=config.activation(),
        ),
    )


def _mistral_layer(config: ConfigFile) -> LayerPattern:
    layer = LayerSpec(activation=config.activation())
    return (replace(layer, window=_window(config)),)


def _window(config: ConfigFile) -> int | None:
    return None if config.get("sliding_window") is None else config.positive("sliding_window")


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "LlamaForCausalLM": Architecture("llama", _llama_layer),
    "MistralForCausalLM": Architecture(
        "mistral",
        _mistral_layer,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
}
