"""The supported architectures: how each reads config.json, and its tensors' names in the file.

An architecture is an entry of ``ARCHITECTURES``; ``models/llama.py`` runs all of them, driven by
the ``ModelSpec`` that the entry makes of config.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from chunkllama.model_spec import LayerSpec, RopeSpec
from chunkllama.models.config_file import ConfigFile
from chunkllama.models.rope_config import read_rope, read_ropes_by_type

LayerPattern = tuple[LayerSpec, ...]
Ropes = Callable[[ConfigFile, int], tuple[RopeSpec, ...]]


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


def _one_rope(**options: bool) -> Ropes:
    """What reads one rope, with the options of ``read_rope``."""

    def read(config: ConfigFile, head_dim: int) -> tuple[RopeSpec, ...]:
        return (read_rope(config, head_dim, **options),)

    return read


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
    ropes: Ropes = field(default_factory=_one_rope)


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
    return (LayerSpec(activation=config.activation(), window=_window(config)),)


def _ministral_layers(config: ConfigFile) -> LayerPattern:
    return _by_type(config, LayerSpec(activation=config.activation()), period=1)


def _qwen2_layers(config: ConfigFile) -> LayerPattern:
    return _qwen_windows(config, LayerSpec(qkv_bias=True, activation=config.activation()))


def _qwen3_layers(config: ConfigFile) -> LayerPattern:
    return _qwen_windows(config, replace(_llama_layer(config)[0], qk_norm="head"))


def _qwen_windows(config: ConfigFile, layer: LayerSpec) -> LayerPattern:
    """Windows only if ``use_sliding_window``, and then from layer ``max_window_layers`` on."""
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return (layer,)
    if config.get("layer_types"):
        return _by_type(config, layer)
    first, count = config.count("max_window_layers", 28), _num_layers(config)
    windowed = replace(layer, window=_window(config))
    return (layer,) * min(first, count) + (windowed,) * max(count - first, 0)


def _smollm3_layers(config: ConfigFile) -> LayerPattern:
    (layer,) = _llama_layer(config)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = config.positive("no_rope_layer_interval", 4)
        rotated = [nth % interval != 0 for nth in range(1, min(interval, 1000) + 1)]
    elif not isinstance(rotated, list) or len(rotated) < _num_layers(config):
        raise config.error("no_rope_layers must be a list of at least num_hidden_layers entries")
    else:
        rotated = rotated[: _num_layers(config)]
    still = replace(layer, rope=None)
    if config.get("layer_types") is not None:
        types = _by_type(config, layer)
        kinds = zip(itertools.cycle(rotated), types, strict=False)
        return tuple(x if rotates else replace(x, rope=None) for rotates, x in kinds)
    if config.flag("use_sliding_window"):
        still = replace(still, window=_window(config))
    return tuple(layer if rotates else still for rotates in rotated)


def _seed_oss_layer(config: ConfigFile) -> LayerPattern:
    (layer,) = _llama_layer(config)
    return (replace(layer, output_bias=config.flag("attention_out_bias")),)


def _granite_fields(config: ConfigFile) -> dict[str, Any]:
    return {
        "attention_scale": config.factor("attention_multiplier"),
        "embedding_multiplier": config.factor("embedding_multiplier"),
        "residual_multiplier": config.factor("residual_multiplier"),
        "logit_multiplier": 1.0 / config.factor("logits_scaling"),
    }


def _arcee_layer(config: ConfigFile) -> LayerPattern:
    return (replace(_llama_layer(config)[0], gated=False),)


def _ernie_layer(config: ConfigFile) -> LayerPattern:
    bias = config.flag("use_bias")
    layer = LayerSpec(qkv_bias=bias, output_bias=bias, mlp_bias=bias)
    return (replace(layer, activation=config.activation()),)


def _hunyuan_layer(config: ConfigFile) -> LayerPattern:
    bias = config.flag("attention_bias")
    layer = LayerSpec(qkv_bias=bias, output_bias=bias, activation=config.activation())
    return (replace(layer, qk_norm="head", norm_after_rotation=True),)


def _olmo2_layer(config: ConfigFile) -> LayerPattern:
    (layer,) = _llama_layer(config)
    return (replace(layer, pre_norm=False, post_norm=True, qk_norm="all"),)


def _olmo3_layers(config: ConfigFile) -> LayerPattern:
    (layer,) = _olmo2_layer(config)
    return _by_type(config, layer, period=4, sliding_rope=1)


def _olmo3_ropes(config: ConfigFile, head_dim: int) -> tuple[RopeSpec, ...]:
    return read_ropes_by_type(config, head_dim, local_theta=500000.0)


def _exaone4_layers(config: ConfigFile) -> LayerPattern:
    layer = LayerSpec(pre_norm=False, post_norm=True, qk_norm="head")
    layer = replace(layer, activation=config.activation())
    if config.get("sliding_window") is None:
        return (layer,)
    period = config.get("sliding_window_pattern")
    if isinstance(period, str):  # "LLLG": so many layers with a window, and one without
        period = len(period)
    elif config.get("layer_types") is None:
        period = config.positive("sliding_window_pattern", 4)
    pattern = _by_type(config, layer, period=period or 1)
    return tuple(x if x.window is not None else replace(x, rope=None) for x in pattern)


def _gemma_layer(config: ConfigFile) -> LayerPattern:
    bias, activation = config.flag("attention_bias"), config.activation()
    if activation == "gelu":  # of the first release's files, which mean its approximation
        activation = "gelu_tanh"
    return (LayerSpec(qkv_bias=bias, output_bias=bias, activation=activation),)


def _gemma2_layers(config: ConfigFile) -> LayerPattern:
    return _by_type(config, _gemma_sandwich(config), period=2)


def _gemma3_layers(config: ConfigFile) -> LayerPattern:
    period = config.positive("sliding_window_pattern", 6)
    layer = replace(_gemma_sandwich(config), qk_norm="head")
    return _by_type(config, layer, period=period, sliding_rope=1)


def _gemma_sandwich(config: ConfigFile) -> LayerSpec:
    (layer,) = _gemma_layer(config)
    return replace(layer, post_norm=True, activation=config.activation("hidden_activation"))


def _gemma_fields(config: ConfigFile) -> dict[str, Any]:
    return {"norm_offset": 1.0, "embedding_multiplier": config.positive("hidden_size") ** 0.5}


def _gemma2_fields(config: ConfigFile) -> dict[str, Any]:
    if config.flag("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention is not supported; only causal models are")
    return {
        **_gemma_fields(config),
        "attention_scale": config.positive("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": config.optional_number("attn_logit_softcapping"),
        "logit_softcap": config.optional_number("final_logit_softcapping"),
    }


def _gemma3_fields(config: ConfigFile) -> dict[str, Any]:
    """transformers ignores the key of a soft cap of scores here."""
    return {**_gemma2_fields(config), "attention_softcap": None}


def _gemma3_ropes(config: ConfigFile, head_dim: int) -> tuple[RopeSpec, ...]:
    local_theta = config.number("rope_local_base_freq", 10000.0)
    return read_ropes_by_type(config, head_dim, local_theta=local_theta)


def _by_type(
    config: ConfigFile, layer: LayerSpec, *, period: int = 1, sliding_rope: int = 0
) -> LayerPattern:
    """Layers as ``layer_types`` says; without it, each ``period``-th one has full attention, and
    with a period of 1 none.
    """
    sliding = replace(layer, window=_window(config), rope=sliding_rope)
    types = config.get("layer_types")
    if types is None:
        last = sliding if period == 1 else layer
        return (sliding,) * (min(period, 1000) - 1) + (last,)
    known = {"full_attention": layer, "sliding_attention": sliding}
    if not isinstance(types, list) or len(types) != _num_layers(config):
        raise config.error("layer_types must be a list of num_hidden_layers entries")
    for name in types:
        if name not in known:
            raise config.error(f"layer_types: {name!r} is not one of {', '.join(known)}")
    return tuple(known[name] for name in types)


def _window(config: ConfigFile) -> int | None:
    return None if config.get("sliding_window") is None else config.positive("sliding_window")


def _num_layers(config: ConfigFile) -> int:
    count = config.positive("num_hidden_layers")
    if count > 10_000:
        raise config.error(f"num_hidden_layers {count} is more than any model has")
    return count


_FUSED = LayerNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_UNGATED = LayerNames(gate_up=("mlp.up_proj",))
_SANDWICH = LayerNames(mlp_norm="pre_feedforward_layernorm")
_HUNYUAN = LayerNames(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm")
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "LlamaForCausalLM": Architecture("llama", _llama_layer),
    "MistralForCausalLM": Architecture(
        "mistral",
        _mistral_layer,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "MinistralForCausalLM": Architecture(
        "ministral",
        _ministral_layers,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        _qwen2_layers,
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        _qwen3_layers,
        {
            **{"num_key_value_heads": 32, "max_position_embeddings": 32768},
            **{"sliding_window": 4096, "head_dim": 128},
        },
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        _smollm3_layers,
        {
            **{"num_key_value_heads": 4, "max_position_embeddings": 32768},
            **{"rope_theta": 2000000.0, "tie_word_embeddings": True},
        },
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        _mistral_layer,
        {
            **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
            **{"rms_norm_eps": 1e-5},
        },
        names=_FUSED,
        ropes=_one_rope(is_partial=True),
    ),
    "GraniteForCausalLM": Architecture("granite", _llama_layer, fields=_granite_fields),
    "SeedOssForCausalLM": Architecture(
        "seed_oss",
        _seed_oss_layer,
        {
            **{"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
            **{"max_position_embeddings": 524288},
        },
    ),
    "ArceeForCausalLM": Architecture(
        "arcee",
        _arcee_layer,
        {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        names=_UNGATED,
    ),
    "Ernie4_5ForCausalLM": Architecture(
        "ernie4_5",
        _ernie_layer,
        {
            **{"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
        },
        ropes=_one_rope(interleaved=True),
    ),
    "HunYuanDenseV1ForCausalLM": Architecture(
        "hunyuan_v1_dense",
        _hunyuan_layer,
        {"rms_norm_eps": 1e-5},
        names=_HUNYUAN,
        ropes=_one_rope(alpha_stretches_base=True),
    ),
    "Olmo2ForCausalLM": Architecture("olmo2", _olmo2_layer, {"rms_norm_eps": 1e-5}),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        _olmo3_layers,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
        ropes=_olmo3_ropes,
    ),
    "Exaone4ForCausalLM": Architecture(
        "exaone4", _exaone4_layers, {"rms_norm_eps": 1e-5, "sliding_window": 4096}
    ),
    "GemmaForCausalLM": Architecture(
        "gemma",
        _gemma_layer,
        {**_GEMMA_DEFAULTS, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"},
        fields=_gemma_fields,
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        _gemma2_layers,
        {
            **{**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "max_position_embeddings": 8192},
            **{"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
        names=_SANDWICH,
        fields=_gemma2_fields,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        _gemma3_layers,
        {
            **{**_GEMMA_DEFAULTS, "num_key_value_heads": 4, "max_position_embeddings": 131072},
            **{"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
            **{"rope_theta": 1000000.0},
        },
        names=_SANDWICH,
        fields=_gemma3_fields,
        ropes=_gemma3_ropes,
    ),
}
