"""GGUF files as Hugging Face folders: indexed, or dequantized once.

A file is served from where it lies: ``index_gguf`` writes configuration and tokenizer files, the
vectors, and where each matrix is. ``convert_gguf`` writes a whole folder that other programs read
too. What the file holds is kept exactly: quantized tensors become float32 there (their values need
it), F16, BF16 and F32 tensors stay as they are. ``dtype`` in config.json says what to compute in.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_config import GgufModel, generation_config, read_gguf
from chunkllama.models.loading.gguf_file import GgufFile
from chunkllama.models.loading.gguf_index import write_index
from chunkllama.models.loading.gguf_layout import check_gguf
from chunkllama.models.loading.gguf_tokenizer import tokenizer_files

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def index_gguf(path: Path, folder: Path) -> None:
    """Write ``folder`` for a file that is served from where it lies.

    Args:
        path: a GGUF file of one of ``GGUF_ARCHITECTURES``.
        folder: exists and is empty.

    Raises:
        ConfigError: as ``convert_gguf``.
    """

    def write(model: GgufModel) -> None:
        vectors = [(name, x) for name, x in model.tensors.items() if len(x.shape) < 2]
        _write_safetensors(folder / "model.safetensors", vectors, model, lambda done, total: None)
        write_index(
            folder,
            path,
            [
                (name, tensor, _permuted_heads(name, model))
                for name, tensor in model.tensors.items()
                if len(tensor.shape) == 2
            ],
        )

    _read(path, folder, write)


def convert_gguf(path: Path, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Write ``folder``: model.safetensors, config, generation config and tokenizer files.

    Args:
        path: a GGUF file of one of ``GGUF_ARCHITECTURES``.
        folder: exists and is empty.
        on_progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: not a GGUF file, another architecture, or a tensor or tokenizer kind that has
            no equivalent.
    """

    def write(model: GgufModel) -> None:
        named = list(model.tensors.items())
        _write_safetensors(folder / "model.safetensors", named, model, on_progress)

    _read(path, folder, write)


def _read(path: Path, folder: Path, write: Callable[[GgufModel], None]) -> None:
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


def _convert(path: Path, folder: Path, write: Callable[[GgufModel], None]) -> None:
    file = GgufFile(path, _open(path))
    model = read_gguf(file)
    for name, content in {
        "config.json": model.config,
        "generation_config.json": generation_config(file, model.config),
        **tokenizer_files(path, file.values),
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))
    write(model)


def _open(path: Path) -> GGUFReader:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _write_safetensors(
    path: Path,
    named: list[tuple[str, ReaderTensor]],
    model: GgufModel,
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
            values = _as_stored_by_transformers(values, name, model)
            file.write(np.ascontiguousarray(values).data)
            on_progress(header[name]["data_offsets"][1], end)


def _as_stored_by_transformers(values: NDArray[Any], name: str, model: GgufModel) -> NDArray[Any]:
    """Undo what llama.cpp's converter does to some tensors of an architecture."""
    if model.entry.norm_offset and name.endswith("norm.weight"):
        if values.dtype != np.float32:
            raise ConfigError(f"tensor {name}: norms of this architecture must be F32")
        return values - np.float32(model.entry.norm_offset)
    heads = _permuted_heads(name, model)
    return unpermute(values, heads) if heads else values


def _permuted_heads(name: str, model: GgufModel) -> int:
    """Heads of a tensor whose rows llama.cpp reorders, else 0."""
    if not model.entry.is_permuted:
        return 0
    for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f"self_attn.{part}." in name:
            return int(model.config[key])
    return 0


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
