"""Compare routers: by prefix, at random, round robin, power of two choices.

    python benchmarks/routing.py replay --trace FILE [--requests N] [--replicas 2 4 8 16]
    python benchmarks/routing.py fleet --trace FILE [--requests 1000000] [--replicas 1000]
    python benchmarks/routing.py plot

``replay`` sends a trace, one line for each request as ``chunkllama capacity`` reads them, through
the real router to real schedulers on a virtual clock. ``fleet`` fits a cost model to such a replay
and sends a generated trace of many tenants through the real router to replicas of that model. Rows
go to ``results/routing.json`` and replace those of the same kind, router and number of replicas.
The numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.simulation.cluster import ClusterReplay, Routed
from chunkllama.simulation.cost_model import StepCost
from chunkllama.simulation.fleet import Fleet, fit_replica, generate
from chunkllama.simulation.routers import ROUTERS, PrefixRouter
from chunkllama.simulation.trace import read_trace

RESULTS = Path(__file__).parent / "results" / "routing.json"
PLOT = RESULTS.with_suffix(".png")
# Assumed, not measured: about a model of 8B parameters on one data-centre GPU. The figures compare
# routers, not machines.
COST = StepCost(step=6e-3, token=2.5e-5, sequence=3e-5, read=1e-8, attention=2e-10)
NUM_CHUNKS, CHUNK_SIZE = 7500, 64
LIMITS = SchedulerLimits(
    max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=200_000, max_waiting=1_000_000,
    policy="fair", fair_quantum=8192, min_wait_tokens=32, enable_prefix_caching=True,
    max_tenant_slowdown=1.5,
    max_step_seconds=0.0,
)  # fmt: skip
DIGEST_SECONDS = 10.0  # virtual


def replayed(trace: Path, requests: int | None, replicas: int, name: str) -> tuple[Routed, Any]:
    router = ROUTERS[name](replicas)
    run = ClusterReplay(
        replicas, LIMITS, NUM_CHUNKS, CHUNK_SIZE, COST.seconds, router, DIGEST_SECONDS
    )
    return run.run(read_trace(trace, limit=requests)), router


def counts(router: Any) -> dict[str, int]:
    return dict(router.routing.counts) if isinstance(router, PrefixRouter) else {}


def seconds_of(values: Any) -> list[float]:
    """Median, 90th and 99th percentile."""
    return [round(float(v), 4) for v in np.quantile(np.asarray(values), (0.5, 0.9, 0.99))]


def replay(arguments: argparse.Namespace) -> None:
    for replicas in arguments.replicas:
        for name in arguments.routers:
            started = time.monotonic()
            result, router = replayed(arguments.trace, arguments.requests, replicas, name)
            ran = [o for o in result.outcomes if not o.refusal]
            busy = [each.busy_seconds / result.seconds for each in result.by_replica]
            prompts = sum(o.request.num_prompt_tokens for o in ran)
            save(
                {
                    "kind": "replay", "router": name, "replicas": replicas,
                    "requests": len(result.outcomes), "refused": len(result.outcomes) - len(ran),
                    "hit_rate": round(sum(o.cached_tokens for o in ran) / prompts, 4),
                    "first_token_seconds": seconds_of([o.first_token_seconds for o in ran]),
                    "seconds": round(result.seconds, 1),
                    "busy": [round(min(busy), 3), round(max(busy), 3)],
                    "counts": counts(router),
                },
                time.monotonic() - started,
            )  # fmt: skip


def fleet(arguments: argparse.Namespace) -> None:
    gc.disable()  # millions of objects, and no cycles of them
    requests = read_trace(arguments.trace)
    sample, _ = replayed(arguments.trace, arguments.fit_requests, 2, "power of two")
    model = fit_replica(sample, COST)
    print(f"fitted: {model}", flush=True)
    for replicas in arguments.replicas:
        for name in arguments.routers:
            started = time.monotonic()
            rate = arguments.rate * replicas
            trace = generate(requests, arguments.requests, arguments.tenants, rate, seed=1)
            router = ROUTERS[name](replicas)
            result = Fleet(replicas, model, NUM_CHUNKS * CHUNK_SIZE, router).run(trace)
            save(
                {
                    "kind": "fleet", "router": name, "replicas": replicas,
                    "requests": arguments.requests, "tenants": arguments.tenants,
                    "hit_rate": round(result.hit_rate, 4),
                    "best_hit_rate": round(result.best_hit_rate, 4),
                    "first_token_seconds": seconds_of(result.first_token_seconds),
                    "busy": [round(float(v), 3) for v in np.quantile(result.busy, (0, 1))],
                    "counts": counts(router),
                    "model": model.as_dict(),
                },
                time.monotonic() - started,
            )  # fmt: skip


def save(row: dict[str, Any], wall: float) -> None:
    print(f"{wall:.0f} s: {json.dumps(row)}", flush=True)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    same = ("kind", "router", "replicas")
    rows = [each for each in rows if any(each[key] != row[key] for key in same)] + [row]
    rows.sort(
        key=lambda each: (each["kind"], each["replicas"], list(ROUTERS).index(each["router"]))
    )
    document = {
        "cost": COST.as_dict(),
        "pool_chunks": NUM_CHUNKS,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path = PLOT) -> None:
    """Draw hit rate and P99 of the first token, one pair of panels for each kind."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = json.loads(RESULTS.read_text())["rows"]
    kinds = [kind for kind in ("replay", "fleet") if any(row["kind"] == kind for row in rows)]
    titles = {"replay": "trace, real schedulers", "fleet": "generated trace, cost model"}
    figure, axes = pyplot.subplots(
        len(kinds), 2, figsize=(10, 3.6 * len(kinds)), layout="constrained", squeeze=False
    )
    colours = dict(zip(ROUTERS, ("#2f6fed", "#9a9a9a", "#f08c2e", "#3d9a50"), strict=True))
    for (left, right), kind in zip(axes, kinds, strict=True):
        sizes = sorted({row["replicas"] for row in rows if row["kind"] == kind})
        for number, router in enumerate(ROUTERS):
            found = {r["replicas"]: r for r in rows if (r["kind"], r["router"]) == (kind, router)}
            at = [sizes.index(size) + 0.2 * number - 0.3 for size in found]
            hits = [100 * row["hit_rate"] for row in found.values()]
            tails = [row["first_token_seconds"][2] for row in found.values()]
            left.bar(at, hits, 0.18, label=router, color=colours[router])
            right.bar(at, tails, 0.18, label=router, color=colours[router])
        left.set_ylabel("prompt tokens from the cache, %")
        right.set_ylabel("P99 of time to first token, s")
        for axis in (left, right):
            axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
            axis.set_xlabel("replicas")
            axis.set_title(titles[kind])
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, sizes, requests in (("replay", [2, 4, 8, 16], None), ("fleet", [1000], 1_000_000)):
        command = commands.add_parser(name)
        command.add_argument("--trace", type=Path, required=True)
        command.add_argument("--requests", type=int, default=requests)
        command.add_argument("--replicas", type=int, nargs="+", default=sizes)
        command.add_argument("--routers", nargs="+", choices=[*ROUTERS], default=[*ROUTERS])
        if name == "fleet":
            command.add_argument("--tenants", type=int, default=100_000)
            command.add_argument("--rate", type=float, default=1.3, help="requests/s of a replica")
            command.add_argument("--fit-requests", type=int, default=500)
    commands.add_parser("plot")
    arguments = parser.parse_args()
    if arguments.command == "plot":
        plot()
    else:
        {"replay": replay, "fleet": fleet}[arguments.command](arguments)


if __name__ == "__main__":
    main()
