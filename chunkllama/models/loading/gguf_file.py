"""The key-value pairs and tensors of a GGUF file, with errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkllama.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor


class GgufFile:
    """A file's key-value pairs and tensors, with errors that name the key.

    Args:
        path: of the file.
        reader: of the same file.

    Raises:
        ConfigError: it has no architecture, or is one part of several.
    """

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            name: entry.contents() for name, entry in reader.fields.items()
        }
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        parts = self.values.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise self.error(
                f"one of {parts} parts of a split GGUF file; join them with llama.cpp's "
                "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        self.architecture = str(self._required("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own keys, such as ``attention.head_count``."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str) -> int:
        value = self._required(f"{self.architecture}.{key}")
        if not isinstance(value, int):
            raise self.error(f"{self.architecture}.{key} is {value!r}, expected one integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        return shortest(self._required(f"{self.architecture}.{key}") if value is None else value)

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}")

    def _required(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(f"the GGUF metadata has no {key}")
        return self.values[key]


def shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, where the file holds 9.999999747e-06."""
    return float(str(np.float32(value)))
