"""Where the tensors of a GGUF file lie: written beside its configuration, read when it is served.

The file itself is not copied. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkllama.errors import ConfigError
from chunkllama.models.config_file import read_json
from chunkllama.models.loading.tensor_info import TensorInfo

if TYPE_CHECKING:
    from gguf import ReaderTensor

INDEX = "gguf.json"
_MAGIC = b"GGUF"


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
    (folder / INDEX).write_text(json.dumps(content | {"sha256": _digest(content)}))


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of an index without its digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder's GGUF file by name.

    Raises:
        ConfigError: the file is gone, has changed or is none of GGUF, or the index is damaged.
    """
    index = read_json(folder / INDEX)
    damaged = ConfigError(f"{folder / INDEX}: damaged; delete {folder}")
    if index.pop("sha256", None) != _digest(index):
        raise damaged
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
        raise damaged from None
    try:
        found, is_gguf = path.stat().st_size, False
        # An index that a publisher has put into a folder may name any file of this machine.
        if path.is_file():
            with path.open("rb") as file:
                is_gguf = file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if (
        not is_gguf
        or found != size
        or any(not 0 <= info.begin <= info.end <= size for info in infos.values())
    ):
        raise ConfigError(f"{path}: has changed since it was indexed; delete {folder}")
    return infos
