"""What a model is, read from its folder's JSON files: numbers only, no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from chunkllama.digits import whole_number
from chunkllama.errors import ConfigError
from chunkllama.model_spec import KV_ITEM_SIZES, ModelSpec, RopeSpec, kv_row_elements
from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.config_file import ConfigFile, read_json
from chunkllama.models.folder_check import check_folder
from chunkllama.models.library_classes import check_library_class
from chunkllama.models.loading.module_tensors import quantization_method
from chunkllama.models.loading.safetensors import stored_dtype
from chunkllama.models.spec_checks import (
    check_numbers,
    default_sampling,
    fork_tokens,
    usable_eos_ids,
)
from chunkllama.models.text_part import text_part

_DECODERS = ("ForCausalLM", "LMHeadModel")
_DTYPES = ("float32", "float16", "bfloat16")


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json, generation_config.json and the tokenizer's end-of-sequence token; where
    config.json names no dtype it is that of the tensors. Of a multimodal checkpoint it is the text
    model.

    Raises:
        ConfigError: the folder is no model, a file is missing or not JSON, a value is out of
            range, or the architecture is neither in ``ARCHITECTURES`` nor a decoder by its name.
    """
    check_folder(folder)
    path = folder / "config.json"
    generation = read_json(folder / "generation_config.json", required=False)
    try:
        tokenizer_eos = _tokenizer_eos(folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: a value has the wrong type: {error}"
        ) from None
    whole = read_json(path)
    text = text_part(whole, path)
    values = whole if text is None else text
    if not (values.get("dtype") or values.get("torch_dtype")):
        values["dtype"] = stored_dtype(folder)
    spec = parse_spec(values, path, generation, tokenizer_eos)
    return spec if text is None else replace(spec, is_text_part=True)


def parse_spec(
    values: dict[str, Any],
    path: Path,
    generation: Mapping[str, Any] | None = None,
    tokenizer_eos: Set[int] = frozenset(),
) -> ModelSpec:
    """The specification that the content of config.json describes; ``path`` is for errors.

    Raises:
        ConfigError: as ``read_spec``.
    """
    try:
        name = _architecture(values, path)
        entry = ARCHITECTURES.get(name)
        config = ConfigFile(path, values, None if entry is None else entry.defaults)
        spec = _parse(name, config, generation or {}, tokenizer_eos)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a value has the wrong type or size: {error}") from None
    check_numbers(spec, path)
    return spec


def _parse(
    name: str, config: ConfigFile, generation: Mapping[str, Any], tokenizer_eos: Set[int]
) -> ModelSpec:
    entry = ARCHITECTURES.get(name)
    if entry is None:
        check_library_class(name, config)
    if entry is None and config.get("quantization_config"):
        raise config.error(
            f"quantized checkpoints of {name} are not supported; use bfloat16 weights"
        )
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    other_names = ("n_head", "n_heads", "num_heads", "attention_heads")
    heads = _size(config, "num_attention_heads", *other_names)
    kv_heads = config.positive("num_key_value_heads", heads)
    head_dim = config.positive("head_dim", hidden // heads)
    if entry is None and config.get("qk_nope_head_dim") is not None:  # latent attention (DeepSeek)
        keys = config.positive("qk_nope_head_dim") + config.positive("qk_rope_head_dim")
        head_dim = max(keys, config.positive("v_head_dim", keys))
        kv_heads = heads  # transformers expands keys and values to all of them
    if heads % kv_heads:
        raise config.error(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise config.error(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
    vocab_size = config.positive("vocab_size")
    common: dict[str, Any] = {
        "architecture": name,
        "is_native": entry is not None,
        "num_layers": _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "hidden_size": hidden,
        "num_qo_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "dtype": _parse_dtype(config),
        "quantization_method": _quantization_method(config),
        "eos_token_ids": usable_eos_ids(
            _ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id")) | tokenizer_eos,
            vocab_size,
            config.path,
        ),
        "default_sampling": default_sampling(
            generation, config.path.with_name("generation_config.json")
        ),
        "fork_tokens": fork_tokens(
            config.get("fork_token_id"), config.get("child_token_id"), config
        ),
    }
    if entry is None:
        length = _size(config, "max_position_embeddings", "n_positions", "max_seq_len")
        return ModelSpec(**common, intermediate_size=hidden, max_position=length, ropes=())
    ropes = entry.ropes(config, head_dim)
    return ModelSpec(
        **common,
        intermediate_size=config.positive("intermediate_size"),
        max_position=_max_position(config, ropes),
        layers=entry.layers(config),
        ropes=ropes,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        **entry.fields(config),
    )


def _max_position(config: ConfigFile, ropes: tuple[RopeSpec, ...]) -> int:
    """The stated length, or what stretched rotary embedding makes of the original one, as vLLM
    derives it. Models with several ropes state the stretched length.
    """
    stated = config.positive("max_position_embeddings", 2048)
    if len(ropes) == 1 and ropes[0].type in ("linear", "dynamic", "yarn"):
        return max(stated, int(ropes[0].original_max_position * ropes[0].factor))
    return stated


def _size(config: ConfigFile, key: str, *other_keys: str) -> int:
    """A size by the first of the names that config.json has."""
    found = next((x for x in (key, *other_keys) if config.get(x) is not None), key)
    return config.positive(found)


def _architecture(values: dict[str, Any], path: Path) -> str:
    names = values.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    kind = values.get("model_type")
    of_kind = [name for name, entry in ARCHITECTURES.items() if entry.model_type == kind]
    for name in names or of_kind:
        if name in ARCHITECTURES:
            return str(name)
    for name in map(str, names):
        if name.endswith(_DECODERS):
            # By the kind, as transformers, which a class renamed since keeps (ERNIE 4.5's). Others
            # transformers may know: engine/model_runner.py asks it.
            return of_kind[0] if of_kind else name
    raise ConfigError(
        f"{path}: unsupported architecture {', '.join(map(str, names)) or 'unknown'}; "
        "supported: decoders (*ForCausalLM), and the text models of the multimodal ones that "
        "'chunkllama models list' names"
    )


def _parse_dtype(config: ConfigFile) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise config.error(f"dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return name


def _quantization_method(config: ConfigFile) -> str:
    settings = config.get("quantization_config")
    if not settings:
        return ""
    try:
        return quantization_method(settings)
    except (AttributeError, ValueError) as error:
        raise config.error(f"quantization_config: {error}") from None


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
        if (
            isinstance(added, dict)
            and added.get("content") == token
            and (token_id := whole_number(str(key))) is not None
        ):
            return {token_id}
    tokenizer = read_json(folder / "tokenizer.json", required=False)
    return {
        added["id"]
        for added in tokenizer.get("added_tokens") or []
        if isinstance(added, dict)
        and added.get("content") == token
        and isinstance(added.get("id"), int)
    }


def resolve_dtype(spec: ModelSpec, dtype: str, device: str, backend: str = "auto") -> str:
    """The dtype to compute in: ``auto`` is the checkpoint's, where the device is good at it.

    On a CPU float16 becomes bfloat16, for which there are instructions. The cpu backend computes
    with bfloat16 weights at every level; the reference backend takes float32 where the CPU has no
    instructions for it. On a GPU float32 becomes bfloat16, which the cuda backend computes in; the
    reference backend by name keeps it.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, got {dtype!r}")
        return dtype
    if device == "cpu":
        fast = backend != "reference" or _cpu_has_bfloat16()
        return "bfloat16" if spec.dtype != "float32" and fast else "float32"
    if spec.dtype == "float32" and backend != "reference":
        return "bfloat16"
    return spec.dtype


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def kv_bytes_per_chunk(spec: ModelSpec, chunk_size: int, dtype: str) -> int:
    """Bytes of K and V of one chunk over all layers; ``dtype`` as ``resolve_dtype`` returns it, or
    int8.
    """
    rows = 2 * spec.num_layers * chunk_size * spec.num_kv_heads
    return rows * kv_row_elements(spec.head_dim, dtype) * KV_ITEM_SIZES[dtype]
