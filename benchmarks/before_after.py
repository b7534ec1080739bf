"""Compare two checkouts of this project in one run, in alternating pairs.

    python benchmarks/before_after.py --before ../base --after . --pairs 10
    python benchmarks/before_after.py --before ../base --after . --after-level avx512 --rounds 0

Both checkouts need ``make setup``. The pairs run ``benchmarks/step.py`` of both checkouts, then the
load of ``compare.py`` against a server of each; the order inside a pair alternates. A ratio is
after to before, larger is faster; the run is added to the report with every rate and the median
ratios. Of each load it also reports the output tokens per second of processor time, of the API and
the engine process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from compare import PAUSE_SECONDS, SCENARIOS, make_prompts, run_load
from machine import cpu_name

from chunkllama.models.loading.hub import resolve_model
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.bench.client import Endpoint
from chunkllama_server.bench.workload import PromptMaker

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"


def step_rates(checkout: Path, rounds: int) -> dict[str, float]:
    """Run a checkout's step.py; return steps per second of each row of its table."""
    command = [checkout / ".venv/bin/python", "benchmarks/step.py", "--rounds", str(rounds)]
    table = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout
    rates = {}
    for line in table.splitlines()[2:]:
        *case, ms, _ = (cell.strip() for cell in line.strip("|").split("|"))
        batch, tenants, shared, private, weights = case
        name = f"step: batch {batch}, {tenants} x {shared} shared, {private} private, {weights}"
        rates[name] = 1e3 / float(ms)
    return rates


def cpu_seconds(server: psutil.Process) -> dict[str, float]:
    """Return the processor time of the API process and of its child, the engine process."""
    times = {"API": server.cpu_times(), "engine": server.children()[0].cpu_times()}
    return {name: used.user + used.system for name, used in times.items()}


@contextmanager
def serving(checkout: Path, level: str = "") -> Iterator[tuple[Endpoint, psutil.Process]]:
    """Serve the demo model from a checkout on a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [checkout / ".venv/bin/chunkllama", "serve", "--port", str(port), "--model", MODEL]
    # The default size differs between versions, and new pages cost time on a virtual machine.
    command += ["--kv-cache-memory", "1GiB"]
    if level:
        command += ["--isa-level", level]
    server = subprocess.Popen(command, cwd=checkout, stderr=subprocess.DEVNULL)
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                status, _ = asyncio.run(endpoint.get("/health/ready"))
            except OSError:
                continue
            if status == 200:
                break
        else:
            raise SystemExit(f"{checkout}: the server did not become ready")
        yield endpoint, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="of step.py in each run; 0 for none")
    parser.add_argument("--scenarios", default="ABCDE", help="of compare.py; empty for none")
    parser.add_argument(
        "--after-level",
        default="",
        help="instruction set of the server after, if before lacks the best",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--output", type=Path, default=RESULTS / "before-after.json")
    arguments = parser.parse_args()
    output = arguments.output
    runs = json.loads(output.read_text())["runs"] if output.exists() else []
    checkouts = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def record(side: str, name: str, rate: float) -> None:
        rates[name][side].append(rate)
        print(f"{side} {name}: {rate:.2f}/s", file=sys.stderr)

    for number in range(arguments.pairs if arguments.rounds else 0):
        for side in list(checkouts)[:: -1 if number % 2 else 1]:
            for name, rate in step_rates(checkouts[side], arguments.rounds).items():
                record(side, name, rate)
    tokenizer = load_tokenizer(resolve_model(MODEL))
    maker = PromptMaker(tokenizer, arguments.seed)
    level = arguments.after_level
    with serving(checkouts["before"]) as before, serving(checkouts["after"], level) as after:
        servers = {"before": before, "after": after}
        for number in range(arguments.pairs):
            for letter in arguments.scenarios:
                scenario = SCENARIOS[letter]
                systems = [
                    tokenizer.encode(maker.text(scenario.system)) for _ in range(scenario.tenants)
                ]
                prompts = make_prompts(maker, tokenizer.encode, systems, scenario)
                for side in list(checkouts)[:: -1 if number % 2 else 1]:
                    time.sleep(PAUSE_SECONDS)
                    endpoint, process = servers[side]
                    used = cpu_seconds(process)
                    load = asyncio.run(run_load(endpoint, MODEL, prompts, scenario))
                    record(side, f"server: {letter} cold", load["output_tokens_per_s"])
                    for name, seconds in cpu_seconds(process).items():
                        rate = scenario.requests * scenario.output / (seconds - used[name])
                        record(side, f"server: {letter} cold, {name} process", rate)

    ratios = {
        name: [a / b for a, b in zip(sides["after"], sides["before"], strict=True)]
        for name, sides in rates.items()
    }
    print("| case | median ratio | lowest | highest |\n| --- | --- | --- | --- |")
    for name, values in ratios.items():
        print(
            f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |"
        )
    report = {
        "command": "python benchmarks/before_after.py " + " ".join(sys.argv[1:]),
        "commits": {side: commit(path) for side, path in checkouts.items()},
        "machine": cpu_name(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "median_ratio": {name: round(statistics.median(v), 4) for name, v in ratios.items()},
        "rates": rates,
    }
    output.write_text(json.dumps({"runs": [*runs, report]}, indent=1) + "\n")


def commit(checkout: Path) -> str:
    """Return the checkout's short commit hash."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
