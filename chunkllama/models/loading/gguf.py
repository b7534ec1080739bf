"""GGUF files as Hugging Face folders: indexed, or dequantized once.

A file is served from where it lies: ``index_gguf`` writes configuration and tokenizer files, the
vectors, and where each matrix is. ``convert_gguf`` writes a whole folder that other programs read
too. What the file holds is kept exactly: quantized tensors become float32 there (their values need
it), F16, BF16 and F32 tensors stay as they are. ``dtype`` in config.json says what to compute in.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_index import write_index
from chunkllama.models.loading.gguf_layout import check_gguf
from chunkllama.models.loading.gguf_tokenizer import tokenizer_files

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"
_STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def index_gguf(path: Path, folder: Path) -> None:
    """Write ``folder`` for a file that is served from where it lies.

    Args:
        path: a GGUF file of the llama architecture.
        folder: exists and is empty.

    Raises:
        ConfigError: as ``convert_gguf``.
    """

    def write(tensors: list[tuple[str, ReaderTensor]], heads: dict[str, int]) -> None:
        vectors = [(name, tensor) for name, tensor in tensors if len(tensor.shape) < 2]
        _write_safetensors(folder / "model.safetensors", vectors, heads, lambda done, total: None)
        write_index(
            folder,
            path,
            [
                (name, tensor, _permuted_heads(name, heads))
                for name, tensor in tensors
                if len(tensor.shape) == 2
            ],
        )

    _read(path, folder, write)


def convert_gguf(path: Path, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Write ``folder``: model.safetensors, config, generation config and tokenizer files.

    Args:
        path: a GGUF file of the llama architecture.
        folder: exists and is empty.
        on_progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: not a GGUF file, another architecture, or a tensor or tokenizer kind that has
            no equivalent.
    """

    def write(tensors: list[tuple[str, ReaderTensor]], heads: dict[str, int]) -> None:
        _write_safetensors(folder / "model.safetensors", tensors, heads, on_progress)

    _read(path, folder, write)


# Named tensors, and the heads of the modules whose rows llama.cpp reorders.
_Writer = Callable[[list[tuple[str, "ReaderTensor"]], dict[str, int]], None]


def _read(path: Path, folder: Path, write: _Writer) -> None:
    check_gguf(path)
    try:
        _convert(path, folder, write)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # The layout is sound but the values contradict each other.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path}: the GGUF metadata contradicts itself ({type(error).__name__}: {reason}); "
            "download the file again"
        ) from None


def _convert(path: Path, folder: Path, write: _Writer) -> None:
    reader = _open(path)
    metadata = _Metadata(path, reader)
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{path}: GGUF architecture {architecture!r}; supported: llama")
    config = _config(metadata, reader)
    for name, content in {
        "config.json": config,
        "generation_config.json": {
            key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config
        },
        **tokenizer_files(path, metadata.values),
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    write(list(_tensors(path, reader)), heads)


def _open(path: Path) -> GGUFReader:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _Metadata:
    """The file's key-value pairs, with errors that name the key."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }

    def text(self, key: str) -> str:
        return str(self.required(key))

    def integer(self, key: str) -> int:
        value = self.required(key)
        if not isinstance(value, int):
            raise ConfigError(f"{self.path}: {key} is {value!r}, expected one integer")
        return value

    def required(self, key: str) -> Any:
        if key not in self.values:
            raise ConfigError(f"{self.path}: the GGUF metadata has no {key}")
        return self.values[key]


def _config(metadata: _Metadata, reader: GGUFReader) -> dict[str, Any]:
    values, tensors = metadata.values, {tensor.name: tensor for tensor in reader.tensors}
    heads, hidden = (
        metadata.integer("llama.attention.head_count"),
        metadata.integer("llama.embedding_length"),
    )
    head_dim = values.get("llama.attention.key_length") or hidden // heads
    if values.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{metadata.path}: partial rotary embedding is not supported")
    if values.get("llama.expert_count"):
        raise ConfigError(f"{metadata.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{metadata.path}: no tensor token_embd.weight; is the file complete?")
    matrix = tensors.get("blk.0.ffn_down.weight", tensors["token_embd.weight"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": _DTYPES.get(matrix.tensor_type.name, "bfloat16"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("llama.feed_forward_length"),
        "num_hidden_layers": metadata.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.integer("llama.context_length"),
        "rms_norm_eps": _shortest(metadata.required("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(values.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if scaling := _rope_scaling(metadata, tensors, config):
        config["rope_scaling"] = scaling
    for key in ("bos", "eos"):
        token = values.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key}_token_id"] = token
    return config


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, where the file holds 9.999999747e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    metadata: _Metadata, tensors: dict[str, ReaderTensor], config: dict[str, Any]
) -> dict[str, Any] | None:
    values = metadata.values
    original = values.get("llama.rope.scaling.original_context_length")
    if _ROPE_FACTORS in tensors:
        return _llama3_scaling(metadata.path, tensors[_ROPE_FACTORS], config, original or 8192)
    kind = values.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"{metadata.path}: rope scaling {kind!r} is not supported")
    scaling = {"rope_type": kind, "factor": float(metadata.required("llama.rope.scaling.factor"))}
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(
    path: Path, tensor: ReaderTensor, config: dict[str, Any], original: int
) -> dict[str, Any]:
    """Llama 3's parameters from the per-frequency divisors that llama.cpp stores instead.

    Raises:
        ConfigError: the divisors are not those of the published parameters (1, 4) for any factor.
    """
    divisors = np.asarray(tensor.data, np.float64).reshape(-1)
    low, high, factor = 1.0, 4.0, float(divisors.max())
    dim = config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise ConfigError(f"{path}: {_ROPE_FACTORS} does not follow llama3's rule; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensors(path: Path, reader: GGUFReader) -> Iterator[tuple[str, ReaderTensor]]:
    """(Hugging Face name, tensor), skipping what is configuration."""
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        stem, _, suffix = tensor.name.rpartition(".")
        if stem in _TOP_NAMES:
            yield f"{_TOP_NAMES[stem]}.{suffix}", tensor
            continue
        block, _, rest = stem.removeprefix("blk.").partition(".")
        if not stem.startswith("blk.") or not block.isdigit() or rest not in _LAYER_NAMES:
            raise ConfigError(f"{path}: tensor {tensor.name} is not part of a Llama")
        yield f"model.layers.{block}.{_LAYER_NAMES[rest]}.{suffix}", tensor


def _write_safetensors(
    path: Path,
    named: list[tuple[str, ReaderTensor]],
    heads: dict[str, int],
    on_progress: Callable[[int, int], None],
) -> None:
    """Stream the tensors into one file: memory stays at one tensor."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in named:
        dtype = _STORED.get(tensor.tensor_type.name, "F32")
        begin, end = end, end + int(tensor.n_elements) * _ITEM_SIZES[dtype]
        shape = [int(size) for size in reversed(tensor.shape)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # aligned tensors can be used where they lie
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in named:
            values = _values(tensor).reshape(header[name]["shape"])
            if permuted := _permuted_heads(name, heads):
                values = unpermute(values, permuted)
            file.write(np.ascontiguousarray(values).data)
            on_progress(header[name]["data_offsets"][1], end)


def _permuted_heads(name: str, heads: dict[str, int]) -> int:
    """Heads of a tensor whose rows llama.cpp reorders, else 0."""
    return next((count for part, count in heads.items() if f"self_attn.{part}" in name), 0)


def _values(tensor: ReaderTensor) -> NDArray[Any]:
    """The tensor's values as stored (BF16 as its two bytes), or dequantized to float32."""
    from gguf import GGMLQuantizationType, dequantize

    match tensor.tensor_type:
        case GGMLQuantizationType.F32 | GGMLQuantizationType.F16:
            return np.asarray(tensor.data)
        case GGMLQuantizationType.BF16:
            return np.asarray(tensor.data).view(np.uint16)
        case kind:
            try:
                return np.asarray(dequantize(tensor.data, kind), dtype=np.float32)
            except NotImplementedError:
                raise ConfigError(
                    f"tensor {tensor.name}: quantization {kind.name} cannot be read"
                ) from None


def unpermute(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of a q or k projection from llama.cpp's order (the pairs of a rotation adjacent) back to
    Hugging Face's (all first halves, then all second halves).
    """
    pairs = values.shape[0] // num_heads // 2
    split = values.reshape(num_heads, pairs, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
