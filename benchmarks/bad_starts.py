"""Time every start that must be refused, each as a process of its own.

    python benchmarks/bad_starts.py

The table is ``tests/server/cli/bad_start_table.py``. Writes the seconds of each to
``results/bad-starts.json``, and prints the slowest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bad-starts.json"
sys.path.insert(0, str(ROOT / "tests" / "server" / "cli"))

from bad_start_table import BAD_STARTS, BadStart, Machine  # noqa: E402  (found in the folder above)
from conftest import write_model  # noqa: E402


def measure(start: BadStart, model: Path, folder: Path) -> float:
    """Return the seconds that a start takes until it is refused."""
    folder.mkdir()
    copy = shutil.copytree(model, folder.with_suffix(".model"))
    with ExitStack() as resources:
        machine = Machine(copy, folder, resources)
        arguments = [str(word) for word in start.arguments(machine)]
        command = [sys.executable, "-m", "chunkllama_server.cli", "serve", *arguments]
        environment = {**os.environ, **machine.environment}
        environment["CHUNKLLAMA_CACHE"] = str(folder.with_suffix(".cache"))
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        seconds = time.monotonic() - began
    if done.returncode != 2:
        raise SystemExit(f"{start.name}: exit code {done.returncode}: {done.stderr.decode()}")
    return round(seconds, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        seconds = {
            start.name: measure(start, model, Path(scratch) / f"start-{number}")
            for number, start in enumerate(BAD_STARTS)
        }
    record = {
        "command": "python benchmarks/bad_starts.py",
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])[:10]:
        print(f"{value:6.2f} s  {name}")


if __name__ == "__main__":
    main()
