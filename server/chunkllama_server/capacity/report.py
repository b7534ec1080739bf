"""Report a capacity plan: a table, a JSON file, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chunkllama.simulation.capacity import Needed, PoolResult
from chunkllama_server.bench.report import command_line


def print_report(
    console: Console,
    results: Sequence[PoolResult],
    needed: Needed | None,
    chunk_size: int,
    cost: str,
) -> None:
    """Print one row per pool asked for, then the pool that the trace needs."""
    table = Table(
        "chunks", "requests", "hit rate", "429s", "400s", "queue p50 / p90 / p99 s",
        "TTFT p50 / p90 / p99 s", "output tok/s", "busy", "peak in use", "evicted",
    )  # fmt: skip
    for row in results:
        table.add_row(
            str(row.num_chunks),
            str(row.requests),
            f"{row.hit_rate:.1%}",
            str(row.refused),
            str(row.too_long),
            " / ".join(f"{value:.2f}" for value in row.queue_seconds),
            " / ".join(f"{value:.2f}" for value in row.first_token_seconds),
            f"{row.output_tokens_per_second:.1f}",
            f"{row.busy:.0%}",
            str(row.peak_chunks),
            str(row.evicted_chunks),
        )
    if results:
        console.print(table)
    if needed is not None:
        console.print(
            f"chunks needed: {needed.num_chunks} of {chunk_size} tokens, for {needed.target:.0%} "
            f"of the best hit rate ({needed.best_hit_rate:.1%}) without more refusals"
        )
    console.print(cost)


def write_report(
    path: Path,
    results: Sequence[PoolResult],
    needed: Needed | None,
    settings: dict[str, Any],
) -> Path:
    """Write the command, the settings and every result as JSON."""
    document: dict[str, Any] = {
        "command": command_line(()),
        "settings": settings,
        "results": [row.as_dict() for row in results],
        "needed": None,
    }
    if needed is not None:
        document["needed"] = {
            "num_chunks": needed.num_chunks,
            "best_hit_rate": needed.best_hit_rate,
            "target": needed.target,
            "tried": [row.as_dict() for row in needed.tried],
        }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def write_plot(path: Path, results: Sequence[PoolResult], needed: Needed | None) -> Path:
    """Plot hit rate, queue times and 429s against the pool's size, of every replay made."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = {row.num_chunks: row for row in (*results, *(needed.tried if needed else ()))}
    sizes = sorted(rows)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    axes[0].plot(sizes, [100 * rows[size].hit_rate for size in sizes], "o-")
    axes[0].set(ylabel="hit rate, % of prompt tokens", ylim=(0, 100))
    for i, label in enumerate(("p50", "p90", "p99")):
        axes[1].plot(sizes, [rows[size].queue_seconds[i] for size in sizes], "o-", label=label)
    axes[1].set(ylabel="queue time, s", ylim=(0, None))
    axes[1].legend()
    axes[2].plot(sizes, [rows[size].refused for size in sizes], "o-")
    axes[2].set(ylabel="requests refused with 429", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="chunks", xscale="log")
        axis.grid(alpha=0.3)
        if needed is not None:
            axis.axvline(needed.num_chunks, color="0.5", linestyle="--")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
