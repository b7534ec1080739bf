"""Read and write pack files; what is read is checked before anything of it is used."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import msgspec

from chunkllama.errors import ConfigError
from chunkllama.packs.document import PackDocument, check_document

SUFFIX = ".ckpack"
TENSOR = "kv"
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
_DOCUMENT, _DIGEST, _SIGNATURE = "chunkllama_pack", "sha256", "ed25519"
_MAX_HEADER_BYTES = 64 << 20
_ALIGNMENT = 64
_NO_DIGEST = "0" * 64
_PART = ".part"
_MODE = 0o600  # prompts of tenants are in it


class Pack:
    """An open pack whose header is sound; its chunks are checked as they are read.

    Args:
        path: of the file.

    Attributes:
        text: the document's bytes, which the signature signs.
        signature: in hexadecimal; "" without one.

    Raises:
        ConfigError: the file is no pack, or damaged; one line that names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise self._damaged("its header's length is wrong")
        raw = self._file.read(length)
        try:
            header = json.loads(raw)
            metadata = header.pop("__metadata__")
            text, digest = metadata[_DOCUMENT], metadata[_DIGEST]
            self.signature = str(metadata.get(_SIGNATURE, ""))
            self.text = text.encode()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise self._damaged("its header is not that of a pack") from None
        if hashlib.sha256(self.text).hexdigest() != digest:
            raise self._damaged("its header's checksum is wrong")
        try:
            self.document = msgspec.json.decode(self.text, type=PackDocument)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise self._damaged(f"its header cannot be read: {error}") from None
        if problem := check_document(self.document):
            raise self._damaged(problem)
        self._begin = 8 + length
        if header != _tensors(self.document):
            raise self._damaged("its tensor is not the one that its header describes")
        if size != self._begin + self.num_bytes:
            raise self._damaged(f"{size} bytes, its header asks for {self._begin + self.num_bytes}")

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path.name}: not a pack, or a damaged one: {what}")

    @property
    def num_bytes(self) -> int:
        """Bytes of K/V."""
        return len(self.document.chunks) * self.document.model.chunk_bytes

    def read_chunk(self, index: int) -> bytearray | None:
        """Read a chunk's bytes; None if they are not those of its checksum."""
        size = self.document.model.chunk_bytes
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            try:
                begin = self._begin + index * size + done
                count = os.preadv(self._file.fileno(), [view[done:]], begin)
            except OSError:
                return None
            if not count:
                return None
            done += count
        digest = hashlib.sha256(buffer).hexdigest()
        return buffer if digest == self.document.chunks[index].sha256 else None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PackWriter:
    """Writes a pack of mode 0600 beside its place; it takes the place when it is whole.

    Args:
        path: its place.
        planned: all that may be written; room is left for its header.
        sign: makes the signature of the document's text.

    Raises (every method):
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        planned: PackDocument,
        sign: Callable[[bytes], str] | None = None,
    ) -> None:
        self._path = path
        self._sign = sign
        blank = [msgspec.structs.replace(chunk, sha256=_NO_DIGEST) for chunk in planned.chunks]
        self._room = len(_header(msgspec.structs.replace(planned, chunks=blank), sign))
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._temporary, flags, _MODE), "wb")
        self._file.seek(self._room)

    def add(self, data: bytes | memoryview) -> str:
        """Write the canonical K/V of the next chunk; returns its checksum."""
        self._file.write(data)
        return hashlib.sha256(data).hexdigest()

    def finish(self, document: PackDocument) -> None:
        """Write the header: that of the chunks that were added, with their checksums."""
        header = _header(document, self._sign, self._room)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        """Put the finished file in its place."""
        self._temporary.replace(self._path)

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # what is left in the buffer cannot be written, perhaps
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed have left beside a pack's place."""
    digits = "[0-9a-f]" * 8
    for left in path.parent.glob(f".{glob.escape(path.name)}.{digits}{_PART}"):
        left.unlink(missing_ok=True)


def loading_mark(path: Path) -> Path:
    """Return the empty file that is beside a snapshot while an engine process loads it."""
    return path.with_name(f".{path.name}.loading")


def write_pack(
    path: Path,
    document: PackDocument,
    chunks: Iterable[bytes | memoryview],
    sign: Callable[[bytes], str] | None = None,
) -> PackDocument:
    """Write a pack, whole or not at all. What a process that was killed has left there is removed.

    Args:
        document: the checksums in it are replaced by those of ``chunks``.
        chunks: K/V of each chunk, canonical; each is used before the next is made.
        sign: makes the signature of the document's text.

    Returns:
        The document that was written.

    Raises:
        OSError: the file cannot be written.
    """
    remove_unfinished(path)
    writer = PackWriter(path, document, sign)
    try:
        digests = [writer.add(data) for data in chunks]
        written = [
            msgspec.structs.replace(chunk, sha256=digest)
            for chunk, digest in zip(document.chunks, digests, strict=True)
        ]
        document = msgspec.structs.replace(document, chunks=written)
        writer.finish(document)
        writer.publish()
    except BaseException:
        writer.discard()
        raise
    return document


def _header(document: PackDocument, sign: Callable[[bytes], str] | None, room: int = 0) -> bytes:
    """Return the length and the header of a safetensors file, padded to ``room`` bytes, by default
    to a multiple of ``_ALIGNMENT``."""
    text = msgspec.json.encode(document)
    metadata = {_DOCUMENT: text.decode(), _DIGEST: hashlib.sha256(text).hexdigest()}
    if sign is not None:
        metadata[_SIGNATURE] = sign(text)
    header = json.dumps({"__metadata__": metadata, **_tensors(document)}).encode()
    padded = room - 8 if room else len(header) + -(len(header) + 8) % _ALIGNMENT
    assert len(header) <= padded, "more than was planned"
    header = header.ljust(padded)
    return len(header).to_bytes(8, "little") + header


def _tensors(document: PackDocument) -> dict[str, object]:
    """Return the header's entries for the tensors."""
    model, count = document.model, len(document.chunks)
    return {
        TENSOR: {
            "dtype": _NAMES[model.dtype],
            "shape": [count, *model.shape],
            "data_offsets": [0, count * model.chunk_bytes],
        }
    }
