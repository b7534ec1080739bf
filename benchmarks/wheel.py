"""Compare a wheel without a compiler with an editable install that compiles, in alternating pairs.

    python benchmarks/wheel.py

Builds the wheel, unpacks it, and runs it as uid 10001 with a read-only home and no compiler
(``unshare`` maps the user). Each run is a process of its own: 16 requests share a prompt of 512
tokens and get 64 tokens each. A ratio is wheel to editable install, larger is faster. Also times
``chunkllama serve`` of the wheel until it is ready. Writes ``results/wheel.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

from machine import cpu_name
from servers import HOST, free_port

from chunkllama.models.loading.hub import resolve_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "wheel.json"
MODEL = "smollm2-135m-instruct"
AS_ANOTHER_USER = ("unshare", "--user", "--map-user=10001", "--map-group=0")
SHARED, REQUESTS, OUTPUT, ROUNDS = 512, 16, 64, 5
LOAD = f"""
import sys, time
import chunkllama
from chunkllama import LLM, SamplingParams
llm = LLM(sys.argv[1], num_chunks=256)
prompts = [[*range(100, {100 + SHARED}), 1000 + i] for i in range({REQUESTS})]
greedy = SamplingParams(temperature=0, max_tokens={OUTPUT}, min_tokens={OUTPUT}, ignore_eos=True)
llm.generate(prompts, greedy)
began = time.perf_counter()
for _ in range({ROUNDS}):
    llm.generate(prompts, greedy)
rate = {ROUNDS * REQUESTS * OUTPUT} / (time.perf_counter() - began)
print(chunkllama.__file__, llm._core.info.isa_level, rate)
"""


def unpacked_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout; returns the folder it is unpacked in."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    command.append("--no-build-isolation")
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def wheel_environment(installed: Path, home: Path) -> dict[str, str]:
    """No compiler, and no folder below the home that can be written."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("CHUNKLLAMA_")}
    own = {"PYTHONPATH": str(installed), "CXX": "no-such-compiler", "HOME": str(home)}
    return {**kept, **own, "CHUNKLLAMA_CACHE": str(home / "cache")}


def rate(command: list[str], environment: dict[str, str], expected: Path, model: Path) -> float:
    """Run the load; returns output tokens per second.

    Raises:
        SystemExit: another copy of the package than the expected one was imported.
    """
    done = subprocess.run(
        [*command, "-c", LOAD, str(model)],
        env=environment, cwd="/", check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    file, level, tokens = done.stdout.split()
    if not Path(file).is_relative_to(expected):
        raise SystemExit(f"{file} was imported, and not from {expected}")
    print(f"{expected}, {level}: {float(tokens):.1f} tokens/s", file=sys.stderr)
    return float(tokens)


def seconds_to_ready(command: list[str], environment: dict[str, str], model: Path) -> float:
    """Start a server; returns the seconds until it answers that it is ready."""
    port = free_port()
    flags = ["-m", "chunkllama_server.cli", "serve", "--model", str(model), "--port", str(port)]
    began = time.monotonic()
    server = subprocess.Popen([*command, *flags, "--log-level", "error"], env=environment, cwd="/")
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://{HOST}:{port}/health/ready", timeout=5).close()
                return time.monotonic() - began
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"the server ended with exit code {server.returncode}")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    model = resolve_model(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        installed, home = unpacked_wheel(Path(scratch)), Path(scratch) / "home"
        home.mkdir(mode=0o500)
        environment = wheel_environment(installed, home)
        as_user = [*AS_ANOTHER_USER, sys.executable, "-P"]
        ready = [seconds_to_ready(as_user, environment, model) for _ in range(3)]
        sides = {
            "wheel": (as_user, environment, installed),
            "editable": ([sys.executable, "-P"], dict(os.environ), ROOT),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.pairs):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                rates[name].append(rate(*sides[name], model))
    ratios = [a / b for a, b in zip(rates["wheel"], rates["editable"], strict=True)]
    record = {
        "command": "python benchmarks/wheel.py " + " ".join(sys.argv[1:]),
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "seconds_to_ready": [round(value, 2) for value in ready],
        "output_tokens_per_s": {k: [round(x, 1) for x in v] for k, v in rates.items()},
        "ratios": [round(value, 3) for value in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(f"ratio {record['median_ratio']}, ready after {record['seconds_to_ready']} s")


if __name__ == "__main__":
    main()
