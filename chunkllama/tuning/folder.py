"""The folder of a training, and the examples in it. No torch.

    examples.msgpack    what to train on, made from the uploaded lines
    state.safetensors   the adapter, the optimizer's moments, and how far the training is
    adapter/            adapter_config.json, adapter_model.safetensors

Each is replaced as a whole, so that a process that ends in the middle leaves the former one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from chunkllama.errors import ConfigError

EXAMPLES: Final = "examples.msgpack"
STATE: Final = "state.safetensors"
ADAPTER: Final = "adapter"


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to train on.

    Attributes:
        token_ids: of the whole conversation.
        targets: indices of the tokens that are trained, ascending, none of them 0.
    """

    token_ids: list[int]
    targets: list[int]

    @property
    def num_inputs(self) -> int:
        """Tokens to compute: those before the last one that is trained."""
        return self.targets[-1]


def write_examples(folder: Path, examples: list[Example]) -> None:
    """Store what a job trains on."""
    replace_file(folder / EXAMPLES, iter([_encoded(examples)]))


def source_digest(weights: str, examples: list[Example]) -> str:
    """SHA-256 of what a training is made from.

    Args:
        weights: digest of the model's weights.
    """
    return hashlib.sha256(weights.encode() + _encoded(examples)).hexdigest()


def _encoded(examples: list[Example]) -> bytes:
    return msgspec.msgpack.encode([(each.token_ids, each.targets) for each in examples])


def read_examples(folder: Path) -> list[Example]:
    """Read what ``write_examples`` has stored.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = folder / EXAMPLES
    try:
        pairs = msgspec.msgpack.decode(path.read_bytes(), type=list[tuple[list[int], list[int]]])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path.name}: cannot be read: {_reason(error)}") from None
    return [Example(token_ids, targets) for token_ids, targets in pairs]


def _reason(error: Exception) -> str:
    """What is wrong, without the path."""
    return str(error.strerror if isinstance(error, OSError) else error)


def replace_file(path: Path, blocks: Iterator[bytes | memoryview]) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
