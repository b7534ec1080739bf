"""Lines of a batch's input file: checked, and ordered so that shared prefixes are neighbours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chunkllama_server.api.schema.batch import BatchError
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.body import is_conversation, parse_json
from chunkllama_server.transport.errors import ApiError

_MAX_ERRORS = 20
_BLOCK_CHARS = 256
_MAX_BLOCKS = 1024
_MAX_CUSTOM_ID = 512
_MAX_MESSAGE = 160  # with that, a job's errors fit what is reserved for its record
_ENVELOPE_BYTES = 8192  # of a line, beside its body
_UNUSED = frozenset(("stream", "stream_options", "background"))  # fields of a body


@dataclass(frozen=True, slots=True)
class Line:
    """One request.

    Attributes:
        number: counted from 1 as editors do.
        start, size: where it lies in the file, in bytes.
    """

    number: int
    start: int
    size: int
    custom_id: str


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """The lines of a file in the order in which they run, or why it cannot be run."""

    lines: list[Line]
    errors: list[BatchError]


class LineReader:
    """Reads lines as the route of their batch reads a body.

    Args:
        path: the input file.
        endpoint: the url of all lines.
        limits: those of a body.
    """

    def __init__(self, path: Path, endpoint: str, limits: LimitsConfig) -> None:
        self.path = path
        self.endpoint = endpoint
        self._limits = limits

    def parse(self, raw: bytes) -> Any:
        """The JSON of a line.

        Raises:
            ApiError: 400, it is not JSON or beyond a limit.
        """
        # The answer does not name what was replaced.
        return parse_json(raw, None, self._limits, partial(is_conversation, self.endpoint))

    def body(self, line: Line) -> dict[str, Any]:
        """The body of a checked line; a batch's answers are whole.

        Raises:
            FileNotFoundError: the file has been deleted.
        """
        with self.path.open("rb") as file:
            file.seek(line.start)
            body: dict[str, Any] = self.parse(file.read(line.size))["body"]
        return {name: value for name, value in body.items() if name not in _UNUSED}

    def raw_lines(self) -> Iterator[bytes | None]:
        """Lines with their ends; None, and nothing after it, for one beyond ``max_body_bytes``."""
        most = self._limits.max_body_bytes + _ENVELOPE_BYTES
        with self.path.open("rb") as file:
            while raw := file.readline(most + 1):
                if len(raw) > most:
                    yield None
                    return
                yield raw

    def too_large(self) -> str:
        return f"The line is larger than {self._limits.max_body_bytes} bytes"


def check_file(reader: LineReader, max_lines: int) -> CheckedFile:
    """Read and check an input file, line by line.

    Raises:
        FileNotFoundError: it has been deleted.
    """
    found: list[tuple[bytes, Line]] = []
    errors: list[BatchError] = []
    seen: set[str] = set()
    start = 0
    for number, raw in enumerate(reader.raw_lines(), 1):
        if raw is None:
            errors.append(_error("line_too_large", number, reader.too_large()))
            break
        if raw.strip():
            read = _read(reader, raw, number, start, seen)
            if isinstance(read, tuple):
                found.append(read)
            else:
                errors.append(read)
        start += len(raw)
        if len(found) > max_lines:
            message = f"A batch has at most {max_lines} lines"
            errors = [_error("too_many_lines", number, message)]
            break
        if len(errors) >= _MAX_ERRORS:
            break
    if not found and not errors:
        errors.append(_error("empty_file", None, "The file has no line"))
    found.sort(key=lambda each: (each[0], each[1].number))
    return CheckedFile([line for _, line in found], errors)


def _error(code: str, line: int | None, message: str, param: str | None = None) -> BatchError:
    return {"code": code, "line": line, "message": message[:_MAX_MESSAGE], "param": param}


def _read(
    reader: LineReader, raw: bytes, number: int, start: int, seen: set[str]
) -> tuple[bytes, Line] | BatchError:
    """A line behind what sorts it, or why it cannot be run."""
    try:
        entry = reader.parse(raw)
    except ApiError as error:
        # Its message is that of a body.
        message = error.message.replace("request body", "line").replace("body", "line")
        return _error("invalid_json_line", number, message)
    if not isinstance(entry, dict):
        return _error("invalid_json_line", number, "The line must be a JSON object")
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        message = f"custom_id must be a text of 1 to {_MAX_CUSTOM_ID} characters"
        return _error("invalid_custom_id", number, message, "custom_id")
    if custom_id in seen:
        message = f"custom_id {custom_id[:100]!a} occurs twice"
        return _error("duplicate_custom_id", number, message, "custom_id")
    if entry.get("method") != "POST":
        return _error("invalid_method", number, "method must be POST", "method")
    if entry.get("url") != reader.endpoint:
        message = f"url must be the batch's endpoint {reader.endpoint}"
        return _error("mismatched_url", number, message, "url")
    if not isinstance(entry.get("body"), dict):
        return _error("missing_body", number, "body must be a JSON object", "body")
    seen.add(custom_id)
    return prefix_order(entry["body"]), Line(number, start, len(raw), custom_id)


def prefix_order(body: dict[str, Any]) -> bytes:
    """A key that sorts bodies as a depth-first walk of the prefix tree of their prompts.

    Prompts are cut in blocks from the front; equal blocks have equal digests, so that prompts with
    a common beginning have keys with one, and stand together.
    """
    text = "".join(_parts(body))
    blocks = range(0, min(len(text), _BLOCK_CHARS * _MAX_BLOCKS), _BLOCK_CHARS)
    return b"".join(
        hashlib.blake2b(text[start : start + _BLOCK_CHARS].encode(), digest_size=8).digest()
        for start in blocks
    )


def _parts(body: dict[str, Any]) -> Iterator[str]:
    """What a prompt is made of, in the order in which templates write it."""
    for name in ("model", "cache_salt", "tools", "functions", "system", "instructions"):
        if body.get(name):
            yield from _texts(body[name])
    for name in ("messages", "input", "prompt"):
        if body.get(name):
            yield from _texts(body[name])


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else [value]
    return [json.dumps(item, ensure_ascii=False) for item in items]
