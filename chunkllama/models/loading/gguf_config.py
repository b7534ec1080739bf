"""config.json from a GGUF file's metadata, and the Hugging Face names of its tensors.

An architecture that llama.cpp writes is an entry of ``GGUF_ARCHITECTURES``; the tensors' names come
from the ``gguf`` package, with which llama.cpp converts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.config import parse_spec
from chunkllama.models.loading.gguf_file import GgufFile, shortest
from chunkllama.models.loading.gguf_rope import ROPE_TENSORS, rope_scaling
from chunkllama.models.loading.gguf_tokenizer import end_token_ids
from chunkllama.models.tensors import HEAD, expected_shapes

if TYPE_CHECKING:
    from gguf import ReaderTensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: the entry of ``ARCHITECTURES`` that runs it.
        name_with_windows: the same for files that state a sliding window; "": no other.
        keys: of config.json beyond those that all have.
        is_permuted: rows of q and k stand with the pairs of a rotation adjacent.
        norm_offset: what was added to the norms' weights.
    """

    name: str
    keys: Callable[[GgufFile, dict[str, Any]], dict[str, Any]] = lambda file, config: {}
    is_permuted: bool = False
    norm_offset: float = 0.0
    name_with_windows: str = ""


def _llama(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has_bias(file, "attn_q"), "mlp_bias": _has_bias(file, "ffn_up")}


def _mistral(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    if file.get("attention.temperature_scale"):
        raise file.error("attention.temperature_scale (Ministral 3) is not supported")
    return {"sliding_window": None}


def _qwen2(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": _has_bias(file, "attn_q")}


def _smollm3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = range(1, config["num_hidden_layers"] + 1)
    return {**_llama(file, config), "no_rope_layers": [int(nth % 4 != 0) for nth in layers]}


def _phi3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "sliding_window": file.get("attention.sliding_window") or None,
        "original_max_position_embeddings": original,
    }


def _granite(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_llama(file, config),
        "attention_multiplier": file.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": file.number("embedding_scale", 1.0),
        "residual_multiplier": file.number("residual_scale", 1.0),
        "logits_scaling": file.number("logit_scale", 1.0),
    }


def _arcee(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {**_llama(file, config), "hidden_act": "relu2"}


def _seed_oss(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    biases = {"attention_out_bias": _has_bias(file, "attn_output")}
    return {**_llama(file, config), **biases}


def _ernie(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": _has_bias(file, "attn_q")}


def _hunyuan(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has_bias(file, "attn_q")}


def _olmo(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    keys = _windows(file, config, period=4)
    if keys:
        theta = {"rope_theta": config["rope_theta"], "rope_type": "default"}
        keys["rope_parameters"] = {
            "full_attention": {**theta, **(config.get("rope_scaling") or {})},
            "sliding_attention": theta,
        }
        keys["rope_scaling"] = None
    return keys


def _exaone4(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    if keys := _windows(file, config, period=4):
        return keys
    layers = config["num_hidden_layers"]
    return {"sliding_window": None, "layer_types": ["full_attention"] * layers}


def _gemma(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(file, config),
        **_windows(file, config, period=2),
        "query_pre_attn_scalar": _query_scalar(config, largest=46),
        "attn_logit_softcapping": file.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    local_theta = file.number("rope.freq_base_swa", 10000.0)
    softcap = file.get("final_logit_softcapping")
    return {
        **_gemma(file, config),
        **_windows(file, config, period=6),
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(config, largest=62),
        "final_logit_softcapping": None if softcap is None else shortest(softcap),
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {"rope_theta": file.number("rope.freq_base", 1e6), **scaling},
            "sliding_attention": {"rope_theta": local_theta, "rope_type": "default"},
        },
    }


def _query_scalar(config: dict[str, Any], *, largest: int) -> int:
    """Which the file lacks: Gemma's largest model alone (so many layers) has another than the
    others.
    """
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _windows(file: GgufFile, config: dict[str, Any], *, period: int) -> dict[str, Any]:
    """Sliding windows, in all layers but each ``period``-th where the file has no list of them."""
    window = file.get("attention.sliding_window")
    if not window:
        return {}
    slides = file.get("attention.sliding_window_pattern")
    if not isinstance(slides, list):
        period = slides if isinstance(slides, int) and slides > 0 else period
        slides = [(nth + 1) % period != 0 for nth in range(config["num_hidden_layers"])]
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {"sliding_window": window, "layer_types": [kinds[bool(x)] for x in slides]}


def _has_bias(file: GgufFile, module: str) -> bool:
    return f"blk.0.{module}.bias" in file.tensors


GGUF_ARCHITECTURES: Final[dict[str, GgufArchitecture]] = {
    "llama": GgufArchitecture("LlamaForCausalLM", _llama, is_permuted=True),
    "mistral3": GgufArchitecture("MistralForCausalLM", _mistral, is_permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", _qwen2),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", _qwen3),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", _smollm3, is_permuted=True),
    "phi3": GgufArchitecture("Phi3ForCausalLM", _phi3),
    "granite": GgufArchitecture("GraniteForCausalLM", _granite, is_permuted=True),
    "arcee": GgufArchitecture("ArceeForCausalLM", _arcee, is_permuted=True),
    "seed_oss": GgufArchitecture("SeedOssForCausalLM", _seed_oss),
    "ernie4_5": GgufArchitecture("Ernie4_5ForCausalLM", _ernie),
    "hunyuan-dense": GgufArchitecture("HunYuanDenseV1ForCausalLM", _hunyuan),
    "olmo2": GgufArchitecture("Olmo2ForCausalLM", _olmo, name_with_windows="Olmo3ForCausalLM"),
    "exaone4": GgufArchitecture("Exaone4ForCausalLM", _exaone4),
    "gemma": GgufArchitecture("GemmaForCausalLM", _gemma, norm_offset=1.0),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", _gemma2, norm_offset=1.0),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", _gemma3, norm_offset=1.0),
}


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file holds, in Hugging Face's terms.

    Attributes:
        config: config.json.
        tensors: by their names there.
        entry: the file's architecture.
    """

    config: dict[str, Any]
    tensors: Mapping[str, ReaderTensor] = field(repr=False)
    entry: GgufArchitecture


def read_gguf(file: GgufFile) -> GgufModel:
    """Map metadata and tensor names.

    Raises:
        ConfigError: an architecture without an entry, a key is missing or a tensor missing or
            unknown; the message names it.
    """
    if file.architecture not in GGUF_ARCHITECTURES:
        raise file.error(
            f"GGUF architecture {file.architecture!r}; supported: {', '.join(GGUF_ARCHITECTURES)}"
        )
    entry = GGUF_ARCHITECTURES[file.architecture]
    config = _config(file, entry)
    return GgufModel(config, _tensors(file, config), entry)


def _config(file: GgufFile, entry: GgufArchitecture) -> dict[str, Any]:
    values, tensors = file.values, file.tensors
    heads, hidden = file.integer("attention.head_count"), file.integer("embedding_length")
    head_dim = file.get("attention.key_length") or hidden // heads
    if file.get("expert_count"):
        raise file.error("mixtures of experts are not supported")
    if "token_embd.weight" not in tensors:
        raise file.error("no tensor token_embd.weight; is the file complete?")
    layers = file.integer("block_count")
    if not 0 < layers < len(tensors):
        raise file.error(f"block_count is {layers}, but the file has {len(tensors)} tensors")
    matrix = tensors.get("blk.0.ffn_down.weight", tensors["token_embd.weight"])
    name = entry.name
    if entry.name_with_windows and file.get("attention.sliding_window"):
        name = entry.name_with_windows
    config = {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "dtype": _DTYPES.get(matrix.tensor_type.name, "bfloat16"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.integer("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }
    rotary_dim = file.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if name != "Phi3ForCausalLM":
            raise file.error(f"{rotary_dim} of {head_dim} dimensions rotate; not supported")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if scaling := rope_scaling(file, config):
        config["rope_scaling"] = scaling
    for key in ("bos", "eos"):
        token = values.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key}_token_id"] = token
    return {**config, **entry.keys(file, config)}


def generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: BOS, and every token that ends an answer."""
    generation = {"bos_token_id": config["bos_token_id"]} if "bos_token_id" in config else {}
    ends = end_token_ids(file.values)
    return {**generation, **({"eos_token_id": ends} if ends else {})}


def _tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, ReaderTensor]:
    """The model's tensors by their Hugging Face names; every tensor of the file is used."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[file.architecture], config["num_hidden_layers"])
    spec = parse_spec(config, file.path)
    tensors, missing = {}, []
    for name, _ in expected_shapes(spec):
        stem, _, suffix = name.rpartition(".")
        ours = "output" if name == HEAD else names.get_name(stem)
        if f"{ours}.{suffix}" in file.tensors:
            tensors[name] = file.tensors[f"{ours}.{suffix}"]
        else:
            missing.append(f"{ours}.{suffix}")
    used = {tensor.name for tensor in tensors.values()}
    unknown = [name for name in file.tensors if name not in used and name not in ROPE_TENSORS]
    for problem, found in (("is missing", missing), ("is not part of the model", unknown)):
        if found:
            raise file.error(
                f"tensor {found[0]} {problem} ({len(found)} in all, architecture "
                f"{file.architecture})"
            )
    return tensors
