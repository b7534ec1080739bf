"""Errors a user can cause, each one clear line; what only a bug can cause is an assertion."""

from __future__ import annotations

_MAX_MESSAGE = 1000
# What a terminal or a reader of lines would act on, and how it is written instead.
CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]}
CONTROL_CHARACTERS |= {9: "\\t", 10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_CONTROL_IN_LINES = {code: text for code, text in CONTROL_CHARACTERS.items() if code != 10}


class ChunkLlamaError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ChunkLlamaError):
    """The configuration, a model folder or a file is unusable; the message names it and the fix.

    Args:
        message: shortened in the middle when it quotes a long value of a damaged file; control
            characters of a quoted name are escaped.
    """

    def __init__(self, message: str) -> None:
        message = message.translate(_CONTROL_IN_LINES)
        if len(message) > _MAX_MESSAGE:
            half = _MAX_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class InvalidRequestError(ChunkLlamaError):
    """A request that is invalid; a retry cannot succeed (HTTP 400).

    Args:
        message: one line with the offending and the allowed values.
        param: path of the offending field as the client wrote it, e.g. ``messages[0].content``.
        code: machine-readable code, e.g. ``context_length_exceeded``.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class OverloadedError(ChunkLlamaError):
    """The queue is full (HTTP 429); ``retry_after`` seconds come from the pool's drain rate."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class DeadlineError(ChunkLlamaError):
    """A request waited or ran longer than the server allows.

    Args:
        message: one line with the limit.
        code: ``queue_timeout`` (HTTP 503) before its first token, else ``deadline`` (HTTP 504).
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class EngineDeadError(ChunkLlamaError):
    """The engine process has ended and the request cannot be continued (HTTP 503)."""


ENDED_ON_DEMAND = "aborted"  # code of a request that an operator or its tenant has ended


class RequestFailedError(ChunkLlamaError):
    """The engine failed this one request (HTTP 500); other requests continue."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
