"""Compare ChunkLlama with other servers: same model and load, one run, alternating order.

Start the servers first (see ``benchmarks/peers/README.md``), then name them:

    python benchmarks/compare.py --model FOLDER \\
        --server chunkllama=http://127.0.0.1:8000 --server vllm=http://127.0.0.1:8101

The first server is this checkout's. The result is named by what is compared (``--name``), its
instruction-set level and the machine, and overwrites no other. It records for each server what
holds it to that level: ``ONEDNN_MAX_CPU_ISA`` of its process, or ``--isa``.

Every round of a scenario makes new prompts and sends them to each server in turn, first with
prefixes new to every server (cold), then with new user parts after the same prefixes (warm). The
order of the servers is reversed every round, with a pause between servers because some keep
spinning for a second after their last answer. Tables contain medians over the rounds, the figure
beside the results (``compare_plot.py``) also the lowest and highest round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
from compare_plot import draw
from machine import describe_run, new_result

from chunkllama.backends.cpu.build import available_levels
from chunkllama.models.loading.hub import resolve_model
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.bench.client import Endpoint, Outcome
from chunkllama_server.bench.workload import PromptMaker

PAUSE_SECONDS = 2.0  # lets the previous server become idle


@dataclass(frozen=True)
class Scenario:
    """A load of ``tenants`` system prompts of ``system`` tokens; user parts are unique."""

    tenants: int
    system: int
    user: int
    output: int
    requests: int
    concurrency: int


SCENARIOS = {
    "A": Scenario(1, 1024, 64, 64, 32, 16),
    "B": Scenario(1, 2048, 64, 64, 32, 16),
    "C": Scenario(4, 1024, 64, 64, 32, 16),
    "D": Scenario(16, 1024, 64, 64, 16, 8),
    "E": Scenario(1, 64, 64, 128, 4, 1),
}


async def run_load(
    endpoint: Endpoint, model: str, prompts: list[list[int]], scenario: Scenario
) -> dict[str, float]:
    """Send the prompts, ``concurrency`` at once; return throughput and latencies."""
    outcomes: list[Outcome] = []
    waiting = iter(prompts)

    async def worker() -> None:
        for prompt in waiting:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": scenario.output,
                "min_tokens": scenario.output,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            outcomes.append(await endpoint.stream("/v1/completions", body, Outcome(0, 0, 0.0)))

    started = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(scenario.concurrency)))
    seconds = time.monotonic() - started
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        raise SystemExit(f"{endpoint.url}: {len(errors)} requests failed, the first: {errors[0]}")
    ttfts = sorted(outcome.ttft * 1e3 for outcome in outcomes)
    return {
        "output_tokens_per_s": sum(o.completion_tokens for o in outcomes) / seconds,
        "ttft_p50_ms": statistics.median(ttfts),
        "ttft_p99_ms": ttfts[min(len(ttfts) - 1, round(0.99 * (len(ttfts) - 1)))],
        "tpot_p50_ms": statistics.median(o.tpot * 1e3 for o in outcomes),
    }


async def version(endpoint: Endpoint) -> str:
    """Return the server's version from /version; "" if it reports none."""
    status, body = await endpoint.get("/version")
    try:
        return json.loads(body)["version"] if status == 200 else ""
    except (ValueError, KeyError):
        return ""


def level_of(url: str, model: str) -> str:
    """Return the instruction-set level that a ChunkLlama server names in its answers."""
    body = json.dumps({"model": model, "prompt": [1], "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        fingerprint = json.load(answer).get("system_fingerprint") or ""
    if "-cpu-" not in fingerprint:
        raise SystemExit(f"{url}: the first server must be ChunkLlama on a CPU")
    return str(fingerprint.split("-cpu-")[1].split("-")[0])


def limit_of(url: str) -> str:
    """Return ONEDNN_MAX_CPU_ISA of the local process that listens at a URL; "" without one."""
    port = urlsplit(url).port
    for listener in psutil.net_connections("tcp"):
        if listener.status == psutil.CONN_LISTEN and listener.laddr.port == port and listener.pid:
            return psutil.Process(listener.pid).environ().get("ONEDNN_MAX_CPU_ISA", "")
    return ""


def held_to(level: str, servers: dict[str, str], stated: dict[str, str]) -> dict[str, str]:
    """Return what holds each server but the first to a level.

    Raises:
        SystemExit: nothing holds one to a level below this machine's best.
    """
    held = {}
    for name, url in list(servers.items())[1:]:
        limit = limit_of(url)
        held[name] = stated.get(name) or (f"ONEDNN_MAX_CPU_ISA={limit}" if limit else "")
        if not held[name] and level != available_levels()[0].name:
            raise SystemExit(
                f"{name} is not held to {level}: start it with ONEDNN_MAX_CPU_ISA, or say how by "
                f"--isa {name}=TEXT"
            )
    return held


def make_prompts(
    maker: PromptMaker, encode, systems: list[list[int]], scenario: Scenario
) -> list[list[int]]:
    return [
        systems[i % scenario.tenants] + encode(maker.text(scenario.user))
        for i in range(scenario.requests)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="for its tokenizer")
    parser.add_argument("--scenarios", default="ABCDE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--name", default="bf16", help="model and weights, in the result's name")
    parser.add_argument(
        "--isa", action="append", default=[], metavar="NAME=TEXT", help="what holds a peer"
    )
    arguments = parser.parse_args()
    servers = dict(entry.split("=", 1) for entry in arguments.server)
    stated = dict(entry.split("=", 1) for entry in arguments.isa)
    endpoints = {name: Endpoint(url) for name, url in servers.items()}
    tokenizer = load_tokenizer(resolve_model(arguments.model))
    maker = PromptMaker(tokenizer, arguments.seed)
    runs = []
    versions: dict[str, str] = {}
    isa: dict[str, str] = {}

    async def everything() -> None:
        names = {}
        for name, endpoint in endpoints.items():
            versions[name] = await version(endpoint)
        for name, endpoint in endpoints.items():
            _, body = await endpoint.get("/v1/models")
            names[name] = json.loads(body)["data"][0]["id"]
        first = next(iter(endpoints))
        isa[first] = level_of(servers[first], names[first])
        isa.update(held_to(isa[first], servers, stated))
        for letter in arguments.scenarios:
            scenario = SCENARIOS[letter]
            for number in range(arguments.rounds):
                systems = [
                    tokenizer.encode(maker.text(scenario.system)) for _ in range(scenario.tenants)
                ]
                order = list(endpoints)[:: -1 if number % 2 else 1]
                for phase in ("cold", "warm"):
                    prompts = make_prompts(maker, tokenizer.encode, systems, scenario)
                    for name in order:
                        await asyncio.sleep(PAUSE_SECONDS)
                        result = await run_load(endpoints[name], names[name], prompts, scenario)
                        runs.append({"server": name, "scenario": letter, "phase": phase, **result})
                        print(
                            f"{letter} {phase} {name}: {result['output_tokens_per_s']:.0f} tok/s",
                            file=sys.stderr,
                        )

    asyncio.run(everything())
    print(table(runs, list(endpoints), arguments.scenarios))
    record = {
        **describe_run(),
        "level": next(iter(isa.values())),
        "isa": isa,
        "versions": versions,
        "seed": arguments.seed,
        "scenarios": {name: vars(SCENARIOS[name]) for name in arguments.scenarios},
        "runs": runs,
    }
    path = new_result(f"compare-{arguments.name}-{record['level']}")
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, path.with_suffix(".png"))
    print(f"saved {path}")


def table(runs: list[dict], servers: list[str], scenarios: str) -> str:
    """Print one row of medians: output tokens/s, TTFT p50 / p99 ms, TPOT p50 ms of each server."""
    lines = [
        "| scenario | " + " | ".join(servers) + " |",
        "| --- |" + " --- |" * len(servers),
    ]
    for letter in scenarios:
        for phase in ("cold", "warm"):
            cells = []
            for server in servers:
                some = [
                    run
                    for run in runs
                    if (run["server"], run["scenario"], run["phase"]) == (server, letter, phase)
                ]

                def median(key: str, some: list[dict] = some) -> float:
                    return statistics.median(run[key] for run in some)

                ttft = f"TTFT {median('ttft_p50_ms'):.0f} / {median('ttft_p99_ms'):.0f}"
                rate = f"{median('output_tokens_per_s'):.0f} tok/s"
                cells.append(f"{rate}, {ttft}, TPOT {median('tpot_p50_ms'):.1f}")
            lines.append(f"| {letter} {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
