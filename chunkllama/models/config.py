"""What a model is, read from its folder's JSON files: numbers only, no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chunkllama.errors import ConfigError

RopeType = Literal["default", "linear", "llama3", "yarn"]
_ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "llama3", "yarn")
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding parameters; names as in transformers' ``rope_parameters``.

    ``factor`` and the fields below it matter only to the types that use them.
    """

    type: RopeType = "default"
    theta: float = 10000.0
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


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A Llama, in numbers.

    Attributes:
        dtype: of the checkpoint: float32, float16 or bfloat16.
        eos_token_ids: ascending union of generation_config.json, config.json and the tokenizer.
        default_sampling: SamplingParams fields that generation_config.json sets.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeSpec = field(default_factory=RopeSpec)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = field(default_factory=dict)

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: (Hq + 2 Hkv) D."""
        return (self.num_qo_heads + 2 * self.num_kv_heads) * self.head_dim


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json, generation_config.json and the tokenizer's end-of-sequence token.

    Raises:
        ConfigError: a file is missing or not JSON, a value is out of range, or the architecture is
            not one that ``models/llama.py`` computes exactly.
    """
    path = folder / "config.json"
    config = read_json(path)
    generation = read_json(folder / "generation_config.json", required=False)
    try:
        return _parse(config, generation, _tokenizer_eos(folder), path)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; {} when the file may be missing and is.

    Raises:
        ConfigError: missing though required, unreadable, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(
                f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB, not a model's JSON"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent}: no such folder; check the model's path") from None
        raise ConfigError(f"{path}: missing; is {path.parent} a model folder?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _parse(
    config: dict[str, Any], generation: dict[str, Any], tokenizer_eos: set[int], path: Path
) -> ModelSpec:
    _check_architecture(config, path)

    def positive(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ConfigError(f"{path}: {key} must be a positive integer, got {value!r}")
        return value

    hidden, heads = positive("hidden_size"), positive("num_attention_heads")
    kv_heads, head_dim = (
        positive("num_key_value_heads", heads),
        positive("head_dim", hidden // heads),
    )
    if heads % kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ConfigError(f"{path}: head_dim {head_dim} is odd; rotary embedding needs pairs")
    max_position = positive("max_position_embeddings", 2048)
    return ModelSpec(
        num_layers=positive("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=positive("intermediate_size"),
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive("vocab_size"),
        max_position=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(config, max_position, path),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        dtype=_parse_dtype(config, path),
        eos_token_ids=tuple(
            sorted(
                _ids(config.get("eos_token_id"))
                | _ids(generation.get("eos_token_id"))
                | tokenizer_eos
            )
        ),
        default_sampling={
            name: generation[name]
            for name in _SAMPLING_DEFAULTS
            if isinstance(generation.get(name), (int, float))
        },
    )


def _check_architecture(config: dict[str, Any], path: Path) -> None:
    names = config.get("architectures") or []
    if not names and config.get("model_type") == "llama":
        names = ["LlamaForCausalLM"]
    if not any(name in _ARCHITECTURES for name in names):
        raise ConfigError(
            f"{path}: unsupported architecture {', '.join(map(str, names)) or 'unknown'}; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    if "MistralForCausalLM" in names:
        # Without a window a Mistral is a Llama, but transformers' defaults for the two differ.
        for key in ("num_key_value_heads", "max_position_embeddings"):
            if key not in config:
                raise ConfigError(f"{path}: a Mistral must state {key}")
        window = config.get("sliding_window", 4096)
        if window is not None and window < config["max_position_embeddings"]:
            raise ConfigError(
                f"{path}: sliding-window attention ({window} tokens) is not supported"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{path}: hidden_act {config['hidden_act']!r} is not supported, only silu"
        )
    if config.get("quantization_config"):
        raise ConfigError(
            f"{path}: quantized checkpoints are not supported; use bfloat16 weights or a GGUF"
        )


def _parse_rope(config: dict[str, Any], max_position: int, path: Path) -> RopeSpec:
    """Both spellings: ``rope_parameters`` (transformers 5) and the older ``rope_scaling``."""
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: rope_parameters must be an object, got {raw!r}")
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            f"{path}: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}"
        )
    if raw.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1, None):
        raise ConfigError(f"{path}: partial_rotary_factor is not supported")
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for key in required.get(kind, ()):
        if key not in raw:
            raise ConfigError(f"{path}: rope_type {kind} needs {key}")
    original = int(
        config.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or max_position
    )
    factor = raw.get("factor")
    if factor is None:
        factor = max_position / original if kind == "yarn" else 1.0
    theta = raw.get("rope_theta") or config.get("rope_theta") or 10000.0
    attention_factor = raw.get("attention_factor")
    return RopeSpec(
        type=kind,
        theta=float(theta),
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
    )


def _parse_dtype(config: dict[str, Any], path: Path) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            f"{path}: dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}"
        )
    return name


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0}


def _tokenizer_eos(folder: Path) -> set[int]:
    config = read_json(folder / "tokenizer_config.json", required=False)
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        return set()
    for key, added in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(added, dict) and added.get("content") == token and str(key).isdigit():
            return {int(key)}
    tokenizer = read_json(folder / "tokenizer.json", required=False)
    return {
        added["id"]
        for added in tokenizer.get("added_tokens") or []
        if isinstance(added, dict)
        and added.get("content") == token
        and isinstance(added.get("id"), int)
    }


def resolve_dtype(spec: ModelSpec, dtype: str, device: str) -> str:
    """The dtype to compute in: ``auto`` is the checkpoint's, where the device is good at it.

    On a CPU that means bfloat16 only with bfloat16 instructions, and never float16.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, got {dtype!r}")
        return dtype
    if device == "cpu" and not (spec.dtype == "bfloat16" and _cpu_has_bfloat16()):
        return "float32"
    return spec.dtype


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def kv_bytes_per_chunk(spec: ModelSpec, chunk_size: int, dtype: str) -> int:
    """Bytes of K and V of one chunk over all layers; ``dtype`` as ``resolve_dtype`` returns it."""
    return 2 * spec.num_layers * chunk_size * spec.num_kv_heads * spec.head_dim * _DTYPES[dtype]
