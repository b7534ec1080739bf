"""Safetensors folders: which tensor lies where, checked in full before a byte of it is read.

Format: 8 bytes little-endian header length, a JSON header, then the tensors back to back. Nothing
in it can execute; pickled weights can, and are refused. No torch here, so that a start that must
fail does so at once.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config_file import read_json
from chunkllama.models.loading.gguf_index import INDEX as GGUF_INDEX
from chunkllama.models.loading.gguf_index import read_index
from chunkllama.models.loading.module_tensors import (
    ModuleTensors,
    find_module,
    unused_tensors,
)
from chunkllama.models.loading.tensor_info import TensorInfo
from chunkllama.models.tensors import EMBEDDING, HEAD, expected_shapes
from chunkllama.models.text_part import text_tensors

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHER_ITEM_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_SIZES = {**ITEM_SIZES, **_OTHER_ITEM_SIZES}
MAX_HEADER_BYTES = 8 << 20  # a 405B model needs 0.2 MB; parsing more costs seconds and gigabytes
BLOCK_BYTES = 4 << 20
_MAX_NAME = 200  # characters of a shard's name; file systems take 255 bytes
_MAX_DIMENSIONS = 8  # the product of many sizes takes time that grows with its square
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Ends of names: buffers that follow from config.json, causal masks, and scales of 8-bit K/V.
HARMLESS = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *("attn.masked_bias", "attn.causal_mask"),
    *(".k_scale", ".v_scale"),
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors a model needs, each located and of the right shape.

    Args:
        folder: of the model.
        spec: what ``read_spec`` read there.

    Raises:
        ConfigError: one line naming the file, the tensor and the fix.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        infos = _with_prefix(_locate(folder))
        self._infos = text_tensors(infos) if spec.is_text_part else infos
        self._maps: dict[Path, mmap.mmap] = {}
        self._modules: dict[str, ModuleTensors] = {}
        if spec.is_native:
            self._check_shapes(folder, spec)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def module(self, name: str) -> ModuleTensors | None:
        """The tensors of a quantized module; None: its weight is one tensor."""
        return self._modules.get(name)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self._infos.values())

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same bytes."""
        infos = self._infos[name], self._infos[other]
        if infos[0].dtype != infos[1].dtype or infos[0].shape != infos[1].shape:
            return False
        buffers = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        pairs = zip(self.blocks(name, buffers[0]), self.blocks(other, buffers[1]), strict=True)
        return all(bytes(block) == bytes(other_block) for block, other_block in pairs)

    def map(self, name: str) -> mmap.mmap:
        """The file of a tensor, mapped privately: pages come from the page cache when touched."""
        path = self._infos[name].path
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]

    def blocks(self, name: str, buffer: bytearray) -> Iterator[memoryview]:
        """A tensor's bytes in blocks of a buffer, the last one short; each valid until the next.

        For what is copied anyway: a read costs half of a first touch of mapped pages, and a buffer
        that is used again costs none.
        """
        info = self._infos[name]
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.begin)
            left = info.end - info.begin
            while left:
                block = memoryview(buffer)[:left]
                done = 0
                while done < len(block):
                    read = file.readinto(block[done:])
                    if not read:
                        raise ConfigError(f"{info.path}: became shorter while it was read")
                    done += read
                left -= done
                yield block

    def _check_shapes(self, folder: Path, spec: ModelSpec) -> None:
        infos, method = self._infos, spec.quantization_method
        if spec.num_layers * 6 > 2 * len(infos) + 9:
            # A layer count out of proportion would make the loop below the slow part.
            raise ConfigError(
                f"{folder}: config.json says {spec.num_layers} layers, the weights hold "
                f"{len(infos)} tensors; are they of the same model?"
            )
        unexpected = set(infos)
        for name, shape in expected_shapes(spec):
            module = name.removesuffix(".weight")
            if method and len(shape) == 2 and (found := self._find(folder, method, module, shape)):
                self._modules[module] = found
                unexpected.difference_update(f"{module}.{suffix}" for suffix in found.infos)
                unexpected.difference_update(unused_tensors(infos, module))
                continue
            info = infos.get(name)
            if info is None:
                raise ConfigError(
                    f"{folder}: the weights have no tensor {name}; is a shard missing?"
                )
            _check_tensor(name, info, shape)
            unexpected.discard(name)
        if HEAD in unexpected:  # tied, and beside the embedding: equal to it or not, it is read
            _check_tensor(HEAD, infos[HEAD], (spec.vocab_size, spec.hidden_size))
            unexpected.discard(HEAD)
        for name in sorted(unexpected):
            # Anything but what old checkpoints keep means another architecture.
            if not name.endswith(HARMLESS):
                raise ConfigError(
                    f"{infos[name].path}: unexpected tensor {name}; the model differs from "
                    "config.json"
                )

    def _find(
        self, folder: Path, method: str, module: str, shape: tuple[int, ...]
    ) -> ModuleTensors | None:
        try:
            return find_module(self._infos, method, module, shape)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None


def stored_dtype(folder: Path) -> str:
    """float32, float16 or bfloat16: the type of the embedding, else of the first tensor of one of
    these; float32 where there is none, or the files cannot be read.
    """
    try:
        infos = _with_prefix(_locate(folder))
    except ConfigError:  # ``Checkpoint`` says what is wrong
        return "float32"
    found = [info.dtype for info in infos.values() if info.dtype in _DTYPES]
    kind = infos[EMBEDDING].dtype if EMBEDDING in infos else ""
    return _DTYPES.get(kind) or _DTYPES[found[0] if found else "F32"]


def is_quantized(info: TensorInfo) -> bool:
    """Whether a tensor is a matrix of one of GGUF's quantized types."""
    return info.dtype not in _SIZES and len(info.shape) == 2


def _check_tensor(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise ConfigError(
            f"{info.path}: tensor {name} has shape {list(info.shape)}, config.json asks for "
            f"{list(shape)}"
        )
    if info.dtype not in ITEM_SIZES and not is_quantized(info):
        raise ConfigError(
            f"{info.path}: tensor {name} is {info.dtype}; supported: {', '.join(ITEM_SIZES)}"
        )


def _locate(folder: Path) -> dict[str, TensorInfo]:
    if (folder / GGUF_INDEX).exists():
        return {**read_header(folder / _SINGLE), **read_index(folder)}
    if (folder / _SINGLE).exists():
        return read_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{folder / pickled[0]}: pickled weights can run code when loaded and are refused; "
                "convert them to safetensors"
            )
        parts = sorted(folder.glob("*.safetensors"))
        fix = "is it a complete model folder?"
        if len(parts) == 1:
            fix = f"rename {parts[0].name} to {_SINGLE} if it holds the whole model"
        elif parts:
            fix = f"download {_INDEX}, which lists the tensors of the {len(parts)} files here"
        raise ConfigError(f"{folder}: no {_SINGLE} and no {_INDEX}; {fix}")
    index = read_json(folder / _INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / _INDEX}: weight_map is missing or empty")
    shards: dict[str, dict[str, TensorInfo]] = {}
    infos = {}
    for name, shard in weight_map.items():
        _check_name(folder, name, shard)
        if shard not in shards:
            if not (folder / shard).is_file():
                raise ConfigError(
                    f"{folder / shard}: missing; {_INDEX} names it, download it again"
                )
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise ConfigError(f"{folder / shard}: has no tensor {name}, though {_INDEX} says so")
        infos[name] = shards[shard][name]
    return infos


def _with_prefix(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Names as the whole model has them: those of a decoder that was saved without its head
    (embedding models) lack their first part.
    """
    stem = EMBEDDING.removeprefix("model.")
    if EMBEDDING in infos or stem not in infos:
        return infos
    return {name if name == HEAD else f"model.{name}": info for name, info in infos.items()}


def _check_name(folder: Path, name: str, shard: Any) -> None:
    """Refuse a shard that is not a safetensors file of the folder."""
    if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
        raise ConfigError(f"{folder / _INDEX}: {name} is in {shard!r}, not a plain file name")
    if len(shard) > _MAX_NAME:
        raise ConfigError(f"{folder / _INDEX}: {name} lies in a file whose name is too long")
    if not shard.endswith(".safetensors"):
        raise ConfigError(
            f"{folder / _INDEX}: {shard} is not a safetensors file; others are refused"
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file.

    Raises:
        ConfigError: it does not describe exactly the bytes of the file.
    """

    def corrupt(what: str) -> ConfigError:
        return ConfigError(f"{path}: corrupt safetensors file: {what}; download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise corrupt(f"a header of {length} bytes in a file of {size}")
            if length > MAX_HEADER_BYTES:
                raise corrupt(f"a header of {length} bytes, more than any model needs")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise corrupt("its header is not JSON") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not an object")
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        try:
            infos[name] = _parse_entry(path, entry, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(f"tensor {name}: {error}") from None
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if info.begin != end:
            raise corrupt(f"tensor {name} starts at byte {info.begin}, expected {end}")
        end = info.end
    if end != size:
        raise corrupt(f"its tensors end at byte {end}, the file at {size}")
    return infos


def _parse_entry(path: Path, entry: Any, data_begin: int) -> TensorInfo:
    dtype, shape = entry["dtype"], entry["shape"]
    begin, end = entry["data_offsets"]
    if dtype not in _SIZES:
        raise ValueError(f"unknown dtype {dtype!r:.60}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions")
    for value in (*shape, begin, end):
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{value!r:.60} is not a size")
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{end - begin} bytes for {dtype} {shape!r:.60}")
    return TensorInfo(path, dtype, tuple(shape), data_begin + begin, data_begin + end)
