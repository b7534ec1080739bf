"""Results of a batch: summed usage, and the files that a finished job has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from chunkllama_server.api.batch.lines import Line
from chunkllama_server.api.batch.store import FileStore, StoredBatch
from chunkllama_server.api.schema.batch import BatchUsage, LineResult

_REASONS = {
    "batch_expired": "The batch expired before this line was run",
    "batch_cancelled": "The batch was cancelled before this line was run",
    "batch_failed": "The batch failed before this line was run",
}


def add_usage(total: BatchUsage, body: Any) -> None:
    """Add the usage of one answer, of any endpoint."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return
    cached = _detail(usage, "prompt_tokens_details", "cached_tokens")
    cached += _detail(usage, "input_tokens_details", "cached_tokens")
    read = usage.get("cache_read_input_tokens") or 0
    created = usage.get("cache_creation_input_tokens") or 0
    prompt = (usage.get("prompt_tokens") or usage.get("input_tokens") or 0) + read + created
    output = usage.get("completion_tokens") or usage.get("output_tokens") or 0
    thoughts = _detail(usage, "completion_tokens_details", "reasoning_tokens")
    thoughts += _detail(usage, "output_tokens_details", "reasoning_tokens")
    thoughts += _detail(usage, "output_tokens_details", "thinking_tokens")
    total["input_tokens"] += prompt
    total["output_tokens"] += output
    total["total_tokens"] += prompt + output
    total["input_tokens_details"]["cached_tokens"] += cached + read
    total["output_tokens_details"]["reasoning_tokens"] += thoughts


def _detail(usage: dict[str, Any], name: str, member: str) -> int:
    details = usage.get(name)
    return int(details.get(member) or 0) if isinstance(details, dict) else 0


def write_results(
    store: FileStore, record: StoredBatch, lines: list[Line], reason: str | None
) -> None:
    """Make the output and the error file of a job from its results, in the order of its lines.

    Files of an earlier try are replaced, so that a process may end at any moment.

    Args:
        reason: why lines without a result have none; they stand in the error file.
    """
    places: dict[int, tuple[int, int]] = {}
    answered: set[int] = set()
    for number, start, size, result in store.read_results(record):
        places[number] = (start, size)
        if _status(result) == 200:
            answered.add(number)
    path = store.results_path(record)

    def output() -> Iterator[bytes]:
        for number in sorted(answered):
            yield _line(_read(path, places[number]))

    def errors() -> Iterator[bytes]:
        for line in lines:
            if line.number not in places and reason is not None:
                yield _line(_missing(line, reason))
            elif line.number in places and line.number not in answered:
                yield _line(_read(path, places[line.number]))

    value = record.value
    for name, blocks, is_needed in (
        ("output", output, bool(answered)),
        ("error", errors, len(answered) < len(lines)),
    ):
        if is_needed:
            made = store.add_file(
                record.tenant,
                f"{record.id}_{name}.jsonl",
                blocks(),
                "batch_output",
                record.output_seconds,
                f"file-{record.id.removeprefix('batch_')}-{name}",
            )
            value[f"{name}_file_id"] = made["id"]  # type: ignore[literal-required]


def _status(result: LineResult) -> int:
    answer = result["response"]
    return 0 if answer is None else answer["status_code"]


def _read(path: Path, place: tuple[int, int]) -> LineResult:
    start, size = place
    with path.open("rb") as file:
        file.seek(start)
        result: LineResult = json.loads(file.read(size))["result"]
    return result


def _missing(line: Line, reason: str) -> LineResult:
    return {
        "id": f"batch_req_{line.number}",
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": reason, "message": _REASONS[reason]},
    }


def _line(result: LineResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"
