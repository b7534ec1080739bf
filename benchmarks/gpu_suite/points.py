"""Run points of measurement in a fixed order, each with a time limit; append results to a file.

A run measures as many points as its time allows and ends with a table. The next run measures the
points without a result for the same device and sources, failed ones last.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import chunkllama
from chunkllama.resources import data_folder

POINT_SECONDS = 40
Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A named measurement; ``run`` returns numbers, or raises: both are recorded."""

    name: str
    run: Callable[[], Record]


class PointTimeout(Exception):
    """A point took longer than its limit."""


def sources_digest(verb: str) -> str:
    """Hash what results depend on: kernels, planner, launches, of `serve` the whole package, and
    the tables but for `tune`, which writes them.
    """
    package = Path(chunkllama.__file__).parent
    python = (
        "attention/plan.py",
        "backends/cuda/backend.py",
        "backends/cuda/plan.py",
        "backends/cuda/launch.py",
    )
    files = [*sorted(data_folder("kernels").glob("cuda/*")), *(package / name for name in python)]
    if verb != "tune":
        files += sorted(data_folder("configs").rglob("sm_*"))
    if verb == "serve":  # all that a request goes through
        files += sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_points(
    verb: str,
    points: list[Point],
    results: Path | None,
    device: Record,
    budget_s: float,
    lost: Callable[[], bool] = lambda: False,
) -> list[Record]:
    """Run the points without a result until the budget is used up; return every record, old and
    new.

    Args:
        results: JSON lines file to append to; None: keep nothing.
        device: description of the machine; a result counts for the same device name only.
        lost: after an error: whether it has taken the device from this process.
    """
    key = {"verb": verb, "device": device.get("name"), "sources": sources_digest(verb)}
    records = [r for r in _read(results) if all(r.get(k) == v for k, v in key.items())]
    done = {record["point"]: record for record in records if "result" in record}
    failed = {record["point"] for record in records}
    todo = [point for point in points if point.name not in done]
    deadline = time.monotonic() + budget_s
    for point in sorted(todo, key=lambda point: point.name in failed):
        if time.monotonic() + POINT_SECONDS > deadline:
            print(f"stopping here: {len(done)} of {len(points)} points; run again to go on")
            break
        begin = time.monotonic()
        try:
            with _time_limit(POINT_SECONDS):
                outcome: Record = {"result": point.run()}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        record = {**key, "point": point.name, "seconds": round(time.monotonic() - begin, 2)}
        record |= {"machine": device} | outcome
        done[point.name] = record
        print(f"{point.name}: {outcome.get('error') or outcome['result']}", flush=True)
        if results:
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if "error" in outcome and lost():
            print("the device is lost to this process: run again to go on")
            break
    return [done[point.name] for point in points if point.name in done]


def forget(results: Path, device_name: str) -> None:
    """Drop the records of one device from the file."""
    kept = [record for record in _read(results) if record["device"] != device_name]
    results.write_text("".join(json.dumps(record) + "\n" for record in kept))


def _read(results: Path | None) -> list[Record]:
    if results is None or not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def expired(_signal: int, _frame: FrameType | None) -> None:
        raise PointTimeout(f"over {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Format rows of equal keys as aligned columns."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
