"""Logging: text or JSON, one line a record with any text, the request's id beside it, no
prompts."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
import time
from contextvars import ContextVar
from typing import Literal, TextIO

from chunkllama.errors import CONTROL_CHARACTERS

LogFormat = Literal["text", "json"]

# Set by the HTTP layer for the request being served; every record made meanwhile carries it.
request_id_context: ContextVar[str] = ContextVar("request_id", default="")
tenant_context: ContextVar[str] = ContextVar("tenant", default="")

_ROOT = "chunkllama"
_NOT_EXTRA = frozenset(vars(logging.makeLogRecord({})))
_NOT_EXTRA |= {"message", "asctime", "taskName", "color_message"}


def init_logger(name: str) -> logging.Logger:
    """The logger of a module: ``logger = init_logger(__name__)``."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def configure_logging(
    level: str = "info", log_format: LogFormat = "text", stream: TextIO | None = None
) -> None:
    """Send every record, warnings and those of libraries included, to ``stream`` (stderr) in one
    format.

    Only the command line calls it, once per process.
    """
    handler = _make_handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries are too verbose at INFO: uvicorn logs each start and stop in six lines.
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger(_ROOT).setLevel(level.upper())
    logging.captureWarnings(True)


def _make_handler(stream: TextIO) -> logging.Handler:
    try:
        return NonBlockingHandler(stream.fileno())
    except (AttributeError, io.UnsupportedOperation, ValueError):  # no file of the system
        return logging.StreamHandler(stream)


class NonBlockingHandler(logging.Handler):
    """Write each record as one line to a descriptor, or drop and count it where that would wait.

    A pipe whose reader has stopped must not stop the process that logs. A descriptor that polls
    writable takes ``PIPE_BUF`` bytes without waiting.
    """

    num_dropped = 0  # lines, of all handlers of the process

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._num_unreported = 0
        self._is_cut = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)
            return
        if self._num_unreported:
            line = f"{self._num_unreported} log lines dropped: the log is not read\n{line}"
        if self._is_cut:
            line = "\n" + line
        if self._write(line.encode(errors="backslashreplace")):
            self._num_unreported = 0
        else:
            self._num_unreported += 1
            NonBlockingHandler.num_dropped += 1

    def _write(self, data: bytes) -> bool:
        for begin in range(0, len(data), select.PIPE_BUF):
            piece = data[begin : begin + select.PIPE_BUF]
            with contextlib.suppress(OSError):
                if self._poll.poll(0) == [(self._descriptor, select.POLLOUT)]:
                    if os.write(self._descriptor, piece) == len(piece):
                        continue
                    begin += 1  # part of the piece is written
            self._is_cut = self._is_cut or begin > 0
            return False
        self._is_cut = False
        return True


class TextFormatter(logging.Formatter):
    """``12:34:56.789 INFO  engine.core [request id] message key=value``, control characters
    escaped."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix(f"{_ROOT}.")
        request = " ".join(filter(None, (request_id_context.get(), tenant_context.get())))
        where = f"{name} [{request}]" if request else name
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {where}: {_message(record)}"
        return (line + extra).translate(CONTROL_CHARACTERS)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; fields passed as ``extra`` become members."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if request_id := request_id_context.get():
            entry["request_id"] = request_id
        if tenant := tenant_context.get():
            entry["tenant"] = tenant
        # ASCII alone: no terminal or log shipper sees a control character or a line separator.
        return json.dumps(entry | _extra(record), default=str)


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    return message


def _extra(record: logging.LogRecord) -> dict[str, object]:
    # A library that adds to every record (Ray) marks what it adds with an underscore.
    return {
        key: value
        for key, value in vars(record).items()
        if key not in _NOT_EXTRA and not key.startswith("_")
    }
