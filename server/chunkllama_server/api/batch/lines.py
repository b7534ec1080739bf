"""Lines of a batch's input file: checked, and ordered so that shared prefixes are neighbours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkllama_server.api.schema.batch import BatchError

_MAX_ERRORS = 20
_BLOCK_CHARS = 256
_MAX_BLOCKS = 1024
_MAX_CUSTOM_ID = 512


@dataclass(frozen=True, slots=True)
class Line:
    """One request.

    Attributes:
        number: counted from 1 as editors do.
        start, size: where it lies in the file, in bytes.
        order: sorts lines by the prefix tree of their prompts.
    """

    number: int
    start: int
    size: int
    custom_id: str
    order: bytes


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """The lines of a file, or why it cannot be run."""

    lines: list[Line]
    errors: list[BatchError]


def check_file(path: Path, endpoint: str, max_lines: int) -> CheckedFile:
    """Read and check an input file; reads line by line."""
    lines: list[Line] = []
    errors: list[BatchError] = []
    seen: set[str] = set()
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                problem = _read(raw, number, start, endpoint, seen)
                if isinstance(problem, Line):
                    lines.append(problem)
                else:
                    errors.append(problem)
            start += len(raw)
            if len(lines) > max_lines:
                message = f"A batch has at most {max_lines} lines"
                errors = [_error("too_many_lines", number, message)]
            if len(errors) >= _MAX_ERRORS or (errors and len(lines) > max_lines):
                break
    if not lines and not errors:
        errors.append(_error("empty_file", None, "The file has no line"))
    return CheckedFile(lines, errors)


def _error(code: str, line: int | None, message: str, param: str | None = None) -> BatchError:
    return {"code": code, "line": line, "message": message, "param": param}


def _read(raw: bytes, number: int, start: int, endpoint: str, seen: set[str]) -> Line | BatchError:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return _error("invalid_json_line", number, "The line is not valid JSON")
    if not isinstance(entry, dict):
        return _error("invalid_json_line", number, "The line must be a JSON object")
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        message = f"custom_id must be a text of 1 to {_MAX_CUSTOM_ID} characters"
        return _error("invalid_custom_id", number, message, "custom_id")
    if custom_id in seen:
        message = f"custom_id {custom_id[:100]!r} occurs twice"
        return _error("duplicate_custom_id", number, message, "custom_id")
    if entry.get("method") != "POST":
        return _error("invalid_method", number, "method must be POST", "method")
    if entry.get("url") != endpoint:
        message = f"url must be the batch's endpoint {endpoint}"
        return _error("mismatched_url", number, message, "url")
    if not isinstance(entry.get("body"), dict):
        return _error("missing_body", number, "body must be a JSON object", "body")
    seen.add(custom_id)
    return Line(number, start, len(raw), custom_id, prefix_order(entry["body"]))


def read_body(path: Path, line: Line) -> dict[str, Any]:
    """The body of a checked line; a batch's answers are whole."""
    with path.open("rb") as file:
        file.seek(line.start)
        body: dict[str, Any] = json.loads(file.read(line.size))["body"]
    return {k: v for k, v in body.items() if k not in ("stream", "stream_options", "background")}


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
