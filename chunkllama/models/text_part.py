"""The text model of a multimodal checkpoint: its part of config.json, and its tensors. No torch.

Images, video and sound are not served, and what a checkpoint holds for them is not read. Given text
alone, the models below compute what their text model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chunkllama.errors import ConfigError
from chunkllama.models.loading.tensor_info import TensorInfo

# Class in config.json -> the text model that transformers assumes. Others attend differently to
# text (PaliGemma), or have text models of their own (Mllama).
OUTER: Final = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen2VLForConditionalGeneration": "qwen2_vl_text",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text",
    "Qwen3VLForConditionalGeneration": "qwen3_vl_text",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
    "LlavaOnevisionForConditionalGeneration": "qwen2",
    "InternVLForConditionalGeneration": "qwen2",
    "Idefics3ForConditionalGeneration": "llama",
    "SmolVLMForConditionalGeneration": "llama",
}
_QWEN_VL: Final = {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 8}
# model_type of a text model -> its architecture, and what published files leave to transformers
# beyond the defaults of that architecture.
_TEXT: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            **{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216},
            **{"num_hidden_layers": 26, "num_attention_heads": 8},
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        {
            **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008},
            **{"num_hidden_layers": 32, "num_attention_heads": 32},
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        {
            **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32},
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_vl_text": ("Qwen2ForCausalLM", _QWEN_VL),
    "qwen2_5_vl_text": ("Qwen2ForCausalLM", _QWEN_VL),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_vl_text": ("Qwen3ForCausalLM", {"rope_theta": 500000.0}),
}
# Keys of the whole config.json that hold for the text model, where it has none of its own.
_SHARED: Final = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")
_PREFIXES: Final = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
)
_OTHERS: Final = (
    *("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "connector."),
    "image_newline",
)


def text_part(values: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the config.json of the text model inside a multimodal one; None: it is not one of
    ``OUTER``.

    Args:
        values: of the whole file.
        path: of it, for errors.

    Raises:
        ConfigError: the text model is not one that runs here.
    """
    names = values.get("architectures")
    outer = str(names[0]) if isinstance(names, list) and names else ""
    if outer not in OUTER:
        return None
    inner = values.get("text_config")
    if inner is None:  # the first files of Qwen2-VL: all keys side by side
        inner = {key: x for key, x in values.items() if key != "model_type"}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{path}: text_config must be an object")
    kind = inner.get("model_type") or OUTER[outer]
    if not isinstance(kind, str) or kind not in _TEXT:
        raise ConfigError(
            f"{path}: text_config: model_type {kind!r:.60} is not a text model that runs inside "
            f"{outer}; supported: {', '.join(_TEXT)}"
        )
    architecture, defaults = _TEXT[kind]
    shared = {key: values[key] for key in _SHARED if values.get(key) is not None}
    own = {key: x for key, x in inner.items() if x is not None or key not in shared}
    tied = [x["tie_word_embeddings"] for x in (values, inner) if "tie_word_embeddings" in x]
    return {
        **{**defaults, **shared, **own},
        "architectures": [architecture],
        # A head in the file is used if it differs, so that a file without one is all that counts.
        "tie_word_embeddings": any(tied) if tied else True,
        "rope_scaling": _of_text(inner.get("rope_scaling")),
        "rope_parameters": _of_text(inner.get("rope_parameters")),
    }


def text_tensors(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors without those of the other parts, by the names that the text model has
    alone.
    """
    found = {}
    for name, info in infos.items():
        if not name.removeprefix("model.").startswith(_OTHERS):
            old, new = next((pair for pair in _PREFIXES if name.startswith(pair[0])), ("", ""))
            found[new + name.removeprefix(old)] = info
    return found


def _of_text(rope: Any) -> Any:
    """Rotary parameters, without the kind whose positions in an image differ by axis: the axes of a
    text's positions are equal.
    """
    if isinstance(rope, Mapping) and "mrope" in (rope.get("type"), rope.get("rope_type")):
        return {**rope, "type": "default", "rope_type": "default"}
    return rope
