"""What a model's K/V depend on, as numbers that two machines can compare. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.packs.document import ModelIdentity
from chunkllama.resources import cache_folder

# Of a specification, what no K/V depends on.
_NOT_COMPUTED = (
    *("ropes", "eos_token_ids", "default_sampling", "dtype", "max_position", "is_text_part"),
)
_STRETCHED = ("dynamic", "longrope")
_BLOCK_BYTES = 1 << 22


def identify_model(  # noqa: PLR0913
    folder: Path,
    spec: ModelSpec,
    *,
    name: str,
    dtype: str,
    kv_dtype: str,
    quantization: str,
    chunk_size: int,
    max_model_len: int,
    arithmetic: str = "",
    drawn_from: str = "",
) -> ModelIdentity:
    """Identify a model that is served; reads all its weights unless they were hashed before.

    Args:
        spec: as ``read_spec`` reads it.
        name: as the user calls the model.
        dtype: that it computes in.
        kv_dtype: of K/V.
        max_model_len: which the frequencies of some rotary embeddings depend on.
        arithmetic: see ``Backend``.
        drawn_from: what random weights depend on beside ``spec``; "": they are those of the folder.

    Raises:
        ConfigError: the weights cannot be read.
    """
    values = asdict(spec)
    ropes = [{**rope, "positions": _positions(rope, max_model_len)} for rope in values["ropes"]]
    rest = {key: value for key, value in values.items() if key not in _NOT_COMPUTED}
    return ModelIdentity(
        name=Path(name).name,
        weights=_digest(drawn_from) if drawn_from else hash_weights(folder, spec),
        architecture=_digest(rest),
        rope=json.dumps(ropes, sort_keys=True),
        quantization=quantization,
        dtype=kv_dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        chunk_size=chunk_size,
        compute_dtype="" if kv_dtype == dtype else dtype,
        arithmetic=arithmetic,
    )


def hash_weights(folder: Path, spec: ModelSpec, on_block: Callable[[], None] = lambda: None) -> str:
    """SHA-256 over the SHA-256 of each weight file, in the order of their names.

    The hash of a file is kept in the cache folder by its path, size and time of change.

    Args:
        on_block: called before each block of 4 MiB is read; what it raises ends the reading.

    Raises:
        ConfigError: a file cannot be read.
    """
    paths = sorted({info.path for info in Checkpoint(folder, spec)}, key=lambda path: path.name)
    try:
        hashes = [_hash_file(path, on_block) for path in paths]
    except OSError as error:
        raise ConfigError(f"{folder}: the weights cannot be read: {error.strerror}") from None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash_file(path: Path, on_block: Callable[[], None]) -> str:
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        kept = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = kept.read_text(encoding="ascii")
            if len(known) == 64:
                return known
        digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
        while True:
            on_block()
            if not (count := file.readinto(block)):
                break
            digest.update(memoryview(block)[:count])
    with contextlib.suppress(OSError):  # without it the next start computes it again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as temporary:
            temporary.write(digest.hexdigest())
        os.replace(temporary.name, kept)
    return digest.hexdigest()


def _positions(rope: dict[str, object], max_model_len: int) -> int:
    return max_model_len if rope["type"] in _STRETCHED else 0


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
