"""Requests of a recorded trace, as token ids.

Two line formats of JSONL are read. Ours::

    {"at": 1.5, "tenant": "a", "prompt_token_ids": [1, 2, 3], "max_tokens": 20}

with ``messages`` or ``prompt`` in place of the ids where a tokenizer is given (the format of
``chunkllama bench serve --trace``). Mooncake's (Qin et al., "Mooncake", FAST 25), whose prompts are
known by hashes of blocks of 512 tokens::

    {"timestamp": 1500, "input_length": 1100, "output_length": 20, "hash_ids": [0, 7, 9]}

Equal ids mean equal tokens up to the end of the block, so the prompts are rebuilt with tokens that
no other block has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from chunkllama.errors import ConfigError, InvalidRequestError

MOONCAKE_BLOCK: Final = 512  # tokens
_MAX_TOKENS: Final = 1 << 24  # of one prompt or output
_MAX_BLOCK: Final = 2**31 // MOONCAKE_BLOCK - 1
DEFAULT_OUTPUT: Final = 64  # tokens, as in `chunkllama bench serve`

Tokenize = Callable[[dict[str, Any]], list[int]]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at: arrival in seconds from the trace's start.
        tenant: whose share of the engine it uses, and whose cache namespace.
        num_prompt_tokens, num_output_tokens: lengths; the output ends at exactly its length.
        token_ids: the prompt; empty where ``blocks`` holds it.
        blocks: ids of the prompt's blocks of ``MOONCAKE_BLOCK`` tokens.
        is_public: it uses the namespace that all tenants match.
        priority: as that of an ``EngineRequest``.
    """

    at: float
    tenant: str
    num_prompt_tokens: int
    num_output_tokens: int
    token_ids: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    is_public: bool = False
    priority: int = 0

    def prompt(self) -> list[int]:
        """Return the prompt's token ids."""
        if not self.blocks:
            return list(self.token_ids)
        starts = np.asarray(self.blocks, np.int64) * MOONCAKE_BLOCK
        ids = starts[:, None] + np.arange(MOONCAKE_BLOCK)
        tokens: list[int] = ids.ravel()[: self.num_prompt_tokens].tolist()
        return tokens


def read_trace(
    path: Path, tokenize: Tokenize | None = None, *, limit: int | None = None
) -> list[TraceRequest]:
    """Read a trace, in order of arrival.

    Args:
        tokenize: returns the prompt of a line with ``messages`` or ``prompt``.
        limit: most requests to read.

    Raises:
        ConfigError: naming the file, the line and the field.
    """
    try:
        with path.open("rb") as file:
            made = list(_requests(file, path, tokenize, limit))
    except OSError as error:
        raise ConfigError(f"trace: cannot read {path}: {error.strerror}") from None
    if not made:
        raise ConfigError(f"trace: {path} holds no request")
    made.sort(key=lambda request: request.at)
    return made


def _requests(
    lines: Iterable[bytes], path: Path, tokenize: Tokenize | None, limit: int | None
) -> Iterator[TraceRequest]:
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if count == limit:
            return
        count += 1
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
            yield _mooncake(entry) if "hash_ids" in entry else _own(entry, tokenize)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"trace: {path}, line {number}: not a JSON object: {error}") from None
        except _FieldError as error:
            raise ConfigError(f"trace: {path}, line {number}: {error}") from None


class _FieldError(ValueError):
    """A field of a line cannot be used."""


def _mooncake(entry: dict[str, Any]) -> TraceRequest:
    length = _integer(entry, "input_length", 1)
    blocks = entry["hash_ids"]
    if not isinstance(blocks, list) or not all(
        isinstance(b, int) and 0 <= b <= _MAX_BLOCK for b in blocks
    ):
        raise _FieldError(f"hash_ids: give a list of integers in [0, {_MAX_BLOCK}]")
    needed = -(-length // MOONCAKE_BLOCK)
    if len(blocks) != needed:
        raise _FieldError(
            f"hash_ids: input_length {length} has {needed} blocks of {MOONCAKE_BLOCK} tokens, "
            f"got {len(blocks)} ids"
        )
    return TraceRequest(
        at=_seconds(entry, "timestamp") / 1000,
        tenant=_tenant(entry),
        num_prompt_tokens=length,
        num_output_tokens=_integer(entry, "output_length", 1),
        blocks=tuple(blocks),
    )


def _own(entry: dict[str, Any], tokenize: Tokenize | None) -> TraceRequest:
    if "prompt_token_ids" in entry:
        ids = entry["prompt_token_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
            raise _FieldError("prompt_token_ids: give a list of integers in [0, 2147483647]")
    elif "messages" not in entry and "prompt" not in entry:
        raise _FieldError("give prompt_token_ids, messages, prompt, or Mooncake's hash_ids")
    elif not _is_conversation(entry.get("messages", [])):
        raise _FieldError("messages: give a list of objects")
    elif tokenize is None:
        raise _FieldError("messages and prompt need a tokenizer; give --model")
    else:
        try:
            ids = tokenize(entry)
        except (ValueError, TypeError, KeyError, InvalidRequestError) as error:
            raise _FieldError(f"messages or prompt: {error}") from None
    if not ids:
        raise _FieldError("the prompt has no token")
    output = _integer(entry, "max_tokens", 1) if "max_tokens" in entry else DEFAULT_OUTPUT
    return TraceRequest(
        at=_seconds(entry, "at") if "at" in entry else 0.0,
        tenant=_tenant(entry),
        num_prompt_tokens=len(ids),
        num_output_tokens=output,
        token_ids=tuple(ids),
    )


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and all(isinstance(each, dict) for each in messages)


def _tenant(entry: dict[str, Any]) -> str:
    tenant = entry.get("tenant", "")
    if isinstance(tenant, bool) or not isinstance(tenant, str | int):
        raise _FieldError(f"tenant: give a name or a number, got {tenant!r}")
    return str(tenant)


def _integer(entry: dict[str, Any], name: str, least: int) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_TOKENS:
        raise _FieldError(f"{name}: give an integer in [{least}, {_MAX_TOKENS}], got {value!r}")
    return value


def _seconds(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise _FieldError(f"{name}: give a time of at least 0, got {value!r}")
    return float(value)
