"""The specification of a model: numbers only, shared by models, loading and backends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

KV_ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
KV_SCALE_BYTES = 2


def kv_row_elements(head_dim: int, dtype: str) -> int:
    """Return how many elements of ``dtype`` hold K, or V, of one head of a token; the codes of int8
    are followed by their scale.
    """
    return head_dim + KV_SCALE_BYTES if dtype == "int8" else head_dim


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding parameters; names as in transformers' ``rope_parameters``.

    ``factor`` and the fields below it matter only to the types that use them.

    Attributes:
        rotary_dim: leading dimensions of a head that rotate; 0: all of them.
        interleaved: pairs are neighbours (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
    """

    type: RopeType = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: which parts it has.

    Attributes:
        pre_norm: normalise what enters attention and MLP.
        post_norm: normalise what leaves them, before the residual sum.
        qk_norm: normalise q and k, each head by itself or all heads together.
        norm_after_rotation: of q and k; False: they are normalised first.
        rope: index into ``ModelSpec.ropes``; None: q and k are not rotated.
        window: keys a query sees, itself included; None: all before it.
        gated: act(gate(x)) * up(x) instead of act(up(x)).
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    norm_after_rotation: bool = False
    rope: int | None = 0
    window: int | None = None
    activation: Activation = "silu"
    gated: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, in numbers.

    Attributes:
        layers: a pattern of layers, repeated up to ``num_layers``.
        attention_scale: factor of the scores; None: head_dim ** -0.5.
        norm_offset: added to every norm weight.
        residual_multiplier: factor of what attention and MLP add to the residual stream.
        logit_multiplier: factor of the logits.
        logit_softcap: logits become softcap * tanh(logits / softcap); None: they stay.
        attention_softcap: the same for attention scores.
        is_native: ``models/llama.py`` runs it; otherwise transformers does, on our attention, and
            only the sizes, limits and tokens here are used.
        is_text_part: the checkpoint is multimodal, and this its text model.
        dtype: of the checkpoint: float32, float16 or bfloat16.
        quantization_method: how the checkpoint stores quantized linear layers ("awq", "gptq",
            "gptq_v2", "compressed-tensors", "fp8"); empty: it has none.
        eos_token_ids: ascending union of generation_config.json, config.json and the tokenizer.
        default_sampling: SamplingParams fields that generation_config.json sets.
        fork_tokens: ids with which an APAR-tuned model (arXiv 2401.06761) begins a branch: the
            fork, after which the parent goes on, and the child, which begins the branch's text.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    architecture: str = "LlamaForCausalLM"
    is_native: bool = True
    is_text_part: bool = False
    layers: tuple[LayerSpec, ...] = (LayerSpec(),)
    ropes: tuple[RopeSpec, ...] = (RopeSpec(),)
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    quantization_method: str = ""
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = field(default_factory=dict)
    fork_tokens: tuple[int, int] | None = None

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: (Hq + 2 Hkv) D."""
        return (self.num_qo_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def layer(self, index: int) -> LayerSpec:
        """The specification of layer ``index``."""
        return self.layers[index % len(self.layers)]

    def for_length(self, num_positions: int) -> ModelSpec:
        """This model for sequences of so many positions: without windows that hide nothing."""
        layers = tuple(
            layer
            if layer.window is None or layer.window < num_positions
            else replace(layer, window=None)
            for layer in self.layers
        )
        return replace(self, layers=layers)
