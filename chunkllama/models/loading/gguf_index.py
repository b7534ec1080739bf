"""Where the tensors of a GGUF file lie: written beside its configuration, read when it is served.

The file itself is not copied. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from chunkllama.errors import ConfigError
from chunkllama.models.config_file import read_json
from chunkllama.models.loading.tensor_info import TensorInfo

if TYPE_CHECKING:
    from gguf import ReaderTensor

INDEX = "gguf.json"


def write_index(folder: Path, path: Path, tensors: Iterable[tuple[str, ReaderTensor, int]]) -> None:
    """Write the index of a file.

    Args:
        folder: of the model.
        path: of the GGUF file.
        tensors: name, tensor, and the number of heads whose rows are in llama.cpp's order, or 0.
    """
    entries = {
        name: {
            "type": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "begin": int(tensor.data_offset),
            "end": int(tensor.data_offset) + int(tensor.n_bytes),
            "heads": heads,
        }
        for name, tensor, heads in tensors
    }
    content = {"file": str(path), "size": path.stat().st_size, "tensors": entries}
    (folder / INDEX).write_text(json.dumps(content))


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder's GGUF file by name.

    Raises:
        ConfigError: the file is gone or has changed, or the index is damaged.
    """
    index = read_json(folder / INDEX)
    try:
        path, size = Path(index["file"]), index["size"]
        infos = {
            str(name): TensorInfo(
                path=path,
                dtype=str(entry["type"]),
                shape=tuple(map(int, entry["shape"])),
                begin=int(entry["begin"]),
                end=int(entry["end"]),
                permuted_heads=int(entry["heads"]),
            )
            for name, entry in index["tensors"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{folder / INDEX}: damaged; delete {folder}") from None
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if found != size or any(not 0 <= info.begin <= info.end <= size for info in infos.values()):
        raise ConfigError(f"{path}: has changed since it was indexed; delete {folder}")
    return infos
