"""Results of a batch: counted, and made files when the job has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from chunkllama_server.api.batch.disk import decode_result, read_results
from chunkllama_server.api.batch.lines import Line
from chunkllama_server.api.schema.batch import BatchUsage, LineResult, RequestCounts

_REASONS = {
    "batch_expired": "The batch expired before this line was run",
    "batch_cancelled": "The batch was cancelled before this line was run",
    "batch_failed": "The batch failed before this line was run",
}
Kind = Literal["output", "error"]


def _no_usage() -> BatchUsage:
    return {
        "input_tokens": 0,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 0,
    }


@dataclass(slots=True)
class Tally:
    """What the results of a job add up to.

    Attributes:
        done: numbers of the lines with a result.
    """

    counts: RequestCounts = field(
        default_factory=lambda: RequestCounts(total=0, completed=0, failed=0)
    )
    usage: BatchUsage = field(default_factory=_no_usage)
    done: set[int] = field(default_factory=set)

    def add(self, number: int, result: LineResult) -> None:
        """Count the result of a line, once."""
        if number in self.done:
            return
        self.done.add(number)
        answer = result.response
        if answer is not None and answer.status_code == 200:
            self.counts["completed"] += 1
            _add_usage(self.usage, _read_usage(answer.body))
        else:
            self.counts["failed"] += 1


def read_tally(path: Path) -> Tally:
    """Count the results that an earlier process has gathered."""
    tally = Tally()
    for entry in read_results(path):
        tally.add(entry.number, entry.result)
    return tally


class _Counted(msgspec.Struct):
    """What is read of an answer."""

    usage: Any = None


def _read_usage(body: msgspec.Raw) -> Any:
    """The usage of an answer, the rest of which is passed over without making objects of it."""
    try:
        return msgspec.json.decode(body, type=_Counted).usage
    except msgspec.ValidationError:  # no object
        return None


def _add_usage(total: BatchUsage, usage: Any) -> None:
    """Add the usage of one answer, of any endpoint."""
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


class MadeFile(NamedTuple):
    """A file of results whose content has been written; ``size`` is in bytes."""

    kind: Kind
    size: int


def write_results(
    path: Path,
    lines: list[Line],
    reason: str | None,
    write: Callable[[Kind, Iterator[bytes]], int],
) -> list[MadeFile]:
    """Write the output and the error file of a job from its results, in the order of its lines.

    Args:
        path: the gathered results.
        lines: of the input file, in any order; none where it is gone.
        reason: why lines without a result have none; they stand in the error file.
        write: writes a file's content and returns its size; the content of an earlier try is
            replaced, so that a process may end at any moment.

    Raises:
        OSError: a file cannot be written.
    """
    answered: dict[int, tuple[int, int]] = {}
    refused: dict[int, tuple[int, int]] = {}
    for number, start, size, result in read_results(path):
        answer = result.response
        is_answered = answer is not None and answer.status_code == 200
        (answered if is_answered else refused)[number] = (start, size)
    missing = {
        line.number: line
        for line in lines
        if reason is not None and line.number not in answered and line.number not in refused
    }

    def output() -> Iterator[bytes]:
        for number in sorted(answered):
            yield _line(_read(path, answered[number]))

    def errors() -> Iterator[bytes]:
        for number in sorted([*refused, *missing]):
            if number in refused:
                yield _line(_read(path, refused[number]))
            else:
                yield _line(_missing(missing[number], str(reason)))

    made = []
    if answered:
        made.append(MadeFile("output", write("output", output())))
    if refused or missing:
        made.append(MadeFile("error", write("error", errors())))
    return made


def missing_bytes(line: Line) -> int:
    """What the error file has at most for a line that was not run."""
    return max(len(_line(_missing(line, reason))) for reason in _REASONS)


def _read(path: Path, place: tuple[int, int]) -> LineResult:
    start, size = place
    with path.open("rb") as file:
        file.seek(start)
        return decode_result(file.read(size))


def _missing(line: Line, reason: str) -> LineResult:
    error = {"code": reason, "message": _REASONS[reason]}
    return LineResult(f"batch_req_{line.number}", line.custom_id, error=error)


def _line(result: LineResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"
