"""Load, fuzzer, fault injector and checker in one program, against one real server.

    python tests/soak.py --seed 1 --minutes 10 --faults kill,stop,memory,raise

Every stream's token ids are compared with those of a serial oracle: the same request, alone, on a
server that shares and caches nothing. A sampled stream may leave the oracle where the draw was
nearly a tie. Counters and pool are checked while it runs and when it is idle. The outcome is one
JSON object; with a failure the exit code is 1, and the command with its seed repeats the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from soak_client import Answer, Case, make_cases
from soak_faults import DEFAULT_FAULTS, FAULTS, FaultInjector
from soak_run import Options, Outcome, Soak
from soak_server import Oracle, Server
from tiny_model import write_tiny_model

MAX_MODEL_LEN = 1024
ROOT = Path(__file__).parents[1]


async def soak(options: Options, folder: Path) -> dict[str, Any]:
    """Run everything in ``folder``, which holds the model and the logs."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    write_tiny_model(folder, MAX_MODEL_LEN)
    alone = Server(folder, folder / "oracle.log", "--num-chunks", "64", "--max-num-seqs", "1",
                   "--no-enable-prefix-caching")  # fmt: skip
    marks = folder / "marks"
    marks.mkdir()
    variables = FaultInjector.variables(marks) if options.faults else {}
    server = Server(folder, folder / "server.log", "--num-chunks", "320", "--engine-hang-seconds",
                    "3", *options.flags, **variables)  # fmt: skip
    try:
        await asyncio.gather(alone.wait_ready(), server.wait_ready())
        oracle = Oracle(alone)
        expected: dict[Case, Answer] = {}
        for case in make_cases(options.seed, options.num_cases, options.max_tokens):
            if (answer := await oracle.answer(case)) is not None:
                expected[case] = answer
        return await _run(options, server, Soak(options, server, marks, oracle, expected))
    finally:
        for each in (alone, server):
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()


async def _run(options: Options, server: Server, run: Soak) -> dict[str, Any]:
    api = psutil.Process(server.process.pid)
    began, descriptors, memory = time.monotonic(), api.num_fds(), api.memory_info().rss
    await run.run()
    outcome = run.outcome
    if outcome.failures:
        return _summary(options, outcome, server)
    metrics = await run.check_idle()
    grown = (api.memory_info().rss - memory) / 2**20
    await _wait_until(lambda: api.num_fds() <= descriptors + 2, outcome, "descriptors are left")
    family = [api, *api.children(recursive=True)]
    if (code := await asyncio.to_thread(server.stop)) != 0:
        outcome.failures.append(f"exit code {code} after SIGTERM")
    if alive := psutil.wait_procs(family[1:], timeout=10)[1]:
        outcome.failures.append(f"processes are left: {alive}")
    flips = outcome.near_ties / max(outcome.sampled, 1)
    if outcome.near_ties > 1 and flips > 0.01:
        outcome.failures.append(f"{flips:.2%} of the sampled streams left the oracle at a near tie")
    numbers = {
        "seconds": round(time.monotonic() - began, 1),
        "engine_restarts": metrics["engine_restarts_total"],
        "replayed_requests": metrics["replayed_requests_total"],
        "watchdog_kills": metrics["watchdog_kills_total"],
        "preemptions": metrics["preemptions_total"],
        "api_memory_idle_mb": [round(memory / 2**20, 1), round(memory / 2**20 + grown, 1)],
        "api_memory_grown_mb": round(grown, 1),
        "api_memory_drift_mb": round(outcome.drift(), 1),
    }
    return _summary(options, outcome, server) | numbers


async def _wait_until(condition: Callable[[], bool], outcome: Outcome, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    outcome.failures.append(what)


def _summary(options: Options, outcome: Outcome, server: Server) -> dict[str, Any]:
    gaps = sorted(outcome.gaps) or [0.0]
    summary = {
        "seed": options.seed,
        "faults": dict(outcome.faults),
        "whole_streams": outcome.whole,
        "left_streams": outcome.left,
        "sampled_streams": outcome.sampled,
        "near_ties": outcome.near_ties,
        "tokens": outcome.tokens,
        "refused": dict(outcome.refused),
        "most_streams_at_once": outcome.most_streams,
        "most_descriptors": outcome.most_descriptors,
        "fuzzed": outcome.fuzzed,
        "seconds_api_mb_engine_mb": _thinned(outcome.memory),
        "longest_gap_p50": round(gaps[len(gaps) // 2], 3),
        "longest_gap_p99": round(gaps[int(0.99 * (len(gaps) - 1))], 3),
        "longest_gap": round(gaps[-1], 3),
        "longest_silence": round(outcome.silence, 3),
        "failures": outcome.failures[:20],
    }
    if outcome.failures:
        summary["log"] = server.log.read_text()[-3000:]
    return summary


def _thinned(memory: list[tuple[float, float, float]]) -> list[str]:
    """About twenty of the samples."""
    some = memory[:: len(memory) // 20 + 1]
    return [f"{seconds:.0f} {api:.0f} {engine:.0f}" for seconds, api, engine in some]


def run(options: Options) -> dict[str, Any]:
    """Run a soak in a temporary folder; ``failures`` of the result is empty if all was right."""
    with tempfile.TemporaryDirectory(prefix="chunkllama-soak-") as folder:
        return asyncio.run(soak(options, Path(folder)))


def _record(arguments: list[str], outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome with what is needed to repeat it."""
    sys.path.append(str(ROOT / "benchmarks"))
    import torch
    from machine import cpu_name

    import chunkllama

    return {
        "command": " ".join(["python tests/soak.py", *arguments]),
        "machine": cpu_name(),
        "python": platform.python_version(),
        "versions": {"chunkllama": chunkllama.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        **outcome,
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Run what a command line asks for, print the outcome and return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--num-faults", type=int, default=0)
    parser.add_argument("--fault-seconds", type=float, default=0.0, help="mean pause between two")
    parser.add_argument(
        "--faults", default=",".join(DEFAULT_FAULTS), help="of " + ", ".join(FAULTS)
    )
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--num-cases", type=int, default=70)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--idle-sockets", type=int, default=0)
    parser.add_argument("--no-cancels", dest="cancels", action="store_false")
    parser.add_argument("--flags", default="", help="more flags of the server, as one word")
    parser.add_argument("--note", default="", help="kept in the outcome, e.g. what else ran")
    parser.add_argument("--save", type=Path, help="also write the outcome there")
    given = vars(parser.parse_args(arguments))
    save, note = given.pop("save"), given.pop("note")
    given["faults"] = tuple(fault for fault in given["faults"].split(",") if fault)
    given["flags"] = tuple(given["flags"].split())
    if unknown := set(given["faults"]) - set(FAULTS):
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    if f"--seed={given['seed']}" not in arguments and "--seed" not in arguments:
        arguments = [*arguments, f"--seed={given['seed']}"]
    outcome = {"note": note, **_record(arguments, run(Options(**given)))}
    text = json.dumps(outcome, indent=1)
    print(text)
    if save is not None:
        (ROOT / save).parent.mkdir(exist_ok=True)
        (ROOT / save).write_text(text + "\n")
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:])["failures"] else 0)
