"""Check a GGUF file's structure against its length before the reader library allocates anything.

Layout: magic, version, tensor count, key count; key-value pairs; tensor descriptions; aligned
data. The library slices past the end of a file without an error, so a damaged length makes it loop
for hours or allocate terabytes; here every length is compared with the bytes that are left.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from chunkllama.errors import ConfigError
from chunkllama.models.folder_check import wrong_content

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Scalar value type to bytes.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_DIMS = 4
_MAX_KEY_BYTES = 65_535
# The library makes one object an array element: four arrays of the largest vocabularies.
_MAX_ELEMENTS = 1 << 21
_MAX_TENSORS = 1 << 16
_MAX_KEYS = 1 << 16


def check_gguf(path: Path) -> None:
    """Raise unless every length in the file fits into it and every string is UTF-8.

    Raises:
        ConfigError: one line naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            if found := wrong_content(path):
                raise ConfigError(f"{path}: {found}")
            if path.stat().st_size < 24:
                raise ConfigError(f"{path}: not a GGUF file: shorter than a header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(path, data).check()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _Walk:
    """One pass over a file; ``at`` is the next byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self._num_elements = 0

    def check(self) -> None:
        if self._take(4, "the magic") != _MAGIC:
            raise self._damaged("no GGUF magic")
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            raise self._damaged(f"version {version}; supported: 2 and 3, little-endian")
        num_tensors, num_keys = self._number("Q", "a count"), self._number("Q", "a count")
        if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
            raise self._damaged(f"{num_tensors} tensors and {num_keys} keys")
        alignment = 32
        keys: set[str] = set()
        for _ in range(num_keys):
            key = self._string("a key", _MAX_KEY_BYTES)
            if key in keys:
                raise self._damaged(f"key {key!r:.100} appears twice")
            keys.add(key)
            kind = self._number("I", f"the type of {key!r:.100}")
            begin = self._at
            self._value(kind, key)
            if key == "general.alignment":
                alignment = int.from_bytes(self._data[begin : self._at], "little")
                if kind != 4 or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
                    raise self._damaged("general.alignment is not a power of two up to 65536")
        self._check_tensors(num_tensors, alignment)

    def _check_tensors(self, num_tensors: int, alignment: int) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kinds = {kind.value: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
        extents: list[tuple[int, int, str]] = []
        names: set[str] = set()
        for _ in range(num_tensors):
            name = self._string("a tensor name", _MAX_KEY_BYTES)
            label = f"tensor {name!r:.100}"
            num_dims = self._number("I", label)
            if name in names or not 1 <= num_dims <= _MAX_DIMS:
                raise self._damaged(f"{label} appears twice or has {num_dims} dimensions")
            names.add(name)
            shape = [self._number("Q", label) for _ in range(num_dims)]
            kind, offset = self._number("I", label), self._number("Q", label)
            if kind not in kinds:
                raise self._damaged(f"{label} has the unknown type {kind}")
            block, block_bytes = kinds[kind]
            if 0 in shape or shape[0] % block:
                raise self._damaged(f"{label} has shape {shape}, no multiple of blocks of {block}")
            extents.append((offset, math.prod(shape) // block * block_bytes, label))
        begin = -(-self._at // alignment) * alignment
        # Two tensors may not share bytes: a few bytes of file would become gigabytes of weights.
        end = 0
        for offset, size, label in sorted(extents):
            if offset < end or offset % alignment or begin + offset + size > self._size:
                raise self._damaged(
                    f"{label} covers bytes {begin + offset} to {begin + offset + size} of "
                    f"{self._size}, outside of the file or over another tensor"
                )
            end = offset + size

    def _value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self._string(f"{key!r:.100}", self._size)
        elif kind in _SIZES:
            self._take(_SIZES[kind], f"{key!r:.100}")
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._damaged(f"{key!r:.100} has the unknown type {kind}")

    def _array(self, key: str) -> None:
        label = f"the array {key!r:.100}"
        kind, count = self._number("I", label), self._number("Q", label)
        self._num_elements += count
        if self._num_elements > _MAX_ELEMENTS:
            raise self._damaged(f"{label} has {count} elements, more than any tokenizer")
        if kind == _STRING:
            for _ in range(count):
                self._string(label, self._size)
        elif kind in _SIZES:
            self._take(count * _SIZES[kind], label)
        else:
            raise self._damaged(f"{label} has elements of the unknown type {kind}")

    def _string(self, what: str, limit: int) -> str:
        length = self._number("Q", what)
        if length > limit:
            raise self._damaged(f"{what} is a string of {length} bytes")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8 text") from None

    def _number(self, code: str, what: str) -> int:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))
        return int(value)

    def _take(self, length: int, what: str) -> bytes:
        if length > self._size - self._at:
            raise self._damaged(f"{what} ends after the file")
        begin, self._at = self._at, self._at + length
        return self._data[begin : self._at]

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(f"{self._path}: not a usable GGUF file: {what}; download it again")
