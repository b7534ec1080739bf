"""What travels between an engine client and the engine loop: msgspec structs, plain data.

What the scheduler itself takes and gives is defined in ``chunkllama.outputs``.
"""

from __future__ import annotations

import msgspec

from chunkllama.outputs import (
    ChoiceDelta,
    EngineErrorInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    TokenDelta,
    TreeNodeInfo,
)

__all__ = [
    "AbortRequest",
    "ChoiceDelta",
    "EngineErrorInfo",
    "EngineReady",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "FromEngine",
    "Shutdown",
    "StartFailed",
    "StatsRequest",
    "ToEngine",
    "TokenDelta",
    "TreeNodeInfo",
]


class AbortRequest(msgspec.Struct, kw_only=True, tag="abort"):
    """The client no longer wants this request (``index`` None) or this one choice."""

    request_id: str
    index: int | None = None


class StatsRequest(msgspec.Struct, kw_only=True, tag="stats"):
    """Ask for an EngineStats; also the liveness probe of an idle engine."""

    include_tree: bool = False


class Shutdown(msgspec.Struct, kw_only=True, tag="shutdown"):
    """Finish the step in flight and exit."""


ToEngine = EngineRequest | AbortRequest | StatsRequest | Shutdown


class EngineReady(msgspec.Struct, kw_only=True, tag="ready"):
    """First message of an engine that has loaded its model: what the client needs to know of it."""

    model_name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    num_chunks: int
    chunk_size: int
    max_request_tokens: int
    device: str
    op_set: str


class StartFailed(msgspec.Struct, kw_only=True, tag="start_failed"):
    """Only message of an engine that could not start: one line for the user."""

    message: str


FromEngine = TokenDelta | EngineStats | EngineReady | StartFailed
