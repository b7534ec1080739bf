"""From an adapter's file to tensors, in the row order of the model's stacked linear layers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.adapter import (
    LINEARS,
    AdapterPart,
    AdapterWeights,
    LinearAdapter,
    LinearName,
)
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.folder_check import check_is_file
from chunkllama.models.loading.adapter_file import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, AdapterFile
from chunkllama.models.loading.tensor_info import TensorInfo
from chunkllama.models.loading.weights import TORCH_DTYPES, row_order
from chunkllama.models.rotary import head_order
from chunkllama.models.tensors import LinearTensors, layer_tensors

_BLOCK_BYTES: Final = 1 << 20


def load_adapter_weights(
    file: AdapterFile, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AdapterWeights:
    """Read an adapter's tensors; the scales are multiplied into the B matrices.

    Raises:
        ConfigError: the files are no longer those that were checked, or a number is not finite.
    """
    data = _read_unchanged(file)
    heads = head_order(spec.ropes[0], spec.head_dim)

    def tensor(info: TensorInfo) -> torch.Tensor:
        kind, (rows, columns) = TORCH_DTYPES[info.dtype], info.shape
        flat = torch.frombuffer(data, dtype=kind, count=rows * columns, offset=info.begin)
        return flat.view(rows, columns)

    def linear(source: LinearTensors) -> LinearAdapter | None:
        total = sum(rows for _, rows in source.parts)
        order = row_order(heads, total, source.rotary_heads)
        stacked, parts, first, offset = [], [], 0, 0
        for name, rows in source.parts:
            module = file.modules.get(name)
            if module is not None:
                a = tensor(module.a).to(dtype)
                b = (tensor(module.b).float() * module.scale).to(dtype)
                for values, which in ((a, "lora_A"), (b, "lora_B")):
                    if not values.isfinite().all():
                        raise ConfigError(
                            f"{file.folder / WEIGHTS}: {name}.{which} holds numbers that are not "
                            f"finite in {str(dtype).removeprefix('torch.')}"
                        )
                if order is not None:
                    b = b[_within(order, first, rows)]
                stacked.append(a.to(device))
                parts.append(AdapterPart(first, offset, b.to(device)))
                offset += module.rank
            first += rows
        return LinearAdapter(torch.cat(stacked), tuple(parts)) if parts else None

    layers: list[dict[LinearName, LinearAdapter]] = []
    for index in range(spec.num_layers):
        sources = layer_tensors(spec, index)
        found = {name: linear(getattr(sources, name)) for name in LINEARS}
        layers.append({name: each for name, each in found.items() if each is not None})
    return AdapterWeights(tuple(layers))


def _within(order: NDArray[np.int64], first: int, rows: int) -> torch.Tensor:
    """The order of the rows of one part; heads are whole within it."""
    return torch.from_numpy(order[first : first + rows] - first)


def _read_unchanged(file: AdapterFile) -> NDArray[np.uint8]:
    """The bytes of the weights' file, if both files are those that were checked."""
    digest = hashlib.sha256()
    data = np.empty(0, np.uint8)
    for name, most in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, file.file_bytes)):
        path = file.folder / name
        check_is_file(path)
        try:
            size = path.stat().st_size
            if size > most:
                raise _changed(file)
            data = np.empty(size, np.uint8)
            digest.update(_read_into(data, path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if digest.hexdigest() != file.digest:
        raise _changed(file)
    return data


def _read_into(data: NDArray[np.uint8], path: Path) -> bytes:
    """Fill ``data`` from a file; returns its SHA-256.

    Reads and hashes blocks: steps run meanwhile, for which the interpreter's lock is needed.
    """
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while done < len(data):
            block = data.data[done : done + _BLOCK_BYTES]
            count = file.readinto(block)
            if not count:
                break  # it has become shorter, and has another digest
            digest.update(block[:count])
            done += count
    return digest.digest()


def _changed(file: AdapterFile) -> ConfigError:
    return ConfigError(f"{file.folder}: has changed since it was loaded; unload and load it")
