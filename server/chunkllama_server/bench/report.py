"""Report a load test: a table, a JSON file, plots."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chunkllama import __version__
from chunkllama.errors import ConfigError
from chunkllama.resources import cpu_name
from chunkllama_server.bench.client import Outcome
from chunkllama_server.bench.workload import Workload

_PERCENTILES = (50, 90, 99)
# Referenced, private, cached, free, as on the dashboard.
_STATE_COLOURS = ("#2f6fed", "#f08c2e", "#7aa7a0", "#e4e7ec")


@dataclass(frozen=True)
class Run:
    """One point of a load test.

    Attributes:
        label: the value that varies between the points, e.g. "concurrency 16".
        seconds: from the first request to the last answer.
        occupancy: samples of the chunk pool over time.
        peak_memory: bytes of the server's process tree, 0 if not measured.
    """

    label: str
    workload: Workload
    outcomes: Sequence[Outcome]
    seconds: float
    occupancy: Sequence[dict[str, float]] = ()
    peak_memory: int = 0

    def summary(self) -> dict[str, Any]:
        """Return counts, rates, and the distributions of TTFT, TPOT and latency in milliseconds."""
        done = [outcome for outcome in self.outcomes if not outcome.error]
        failed = [outcome.error for outcome in self.outcomes if outcome.error]
        output = sum(outcome.completion_tokens for outcome in done)
        prompt = sum(outcome.prompt_tokens for outcome in done)
        return {
            "requests": len(done),
            "failed": len(failed),
            "first_error": failed[0] if failed else None,
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(len(done) / self.seconds, 3),
            "output_tokens_per_second": round(output / self.seconds, 2),
            "total_tokens_per_second": round((output + prompt) / self.seconds, 2),
            "prompt_tokens": prompt,
            "output_tokens": output,
            "cached_share": round(sum(o.cached_tokens for o in done) / max(prompt, 1), 4),
            "ttft_ms": _distribution([outcome.ttft for outcome in done]),
            "tpot_ms": _distribution([o.tpot for o in done if o.completion_tokens > 1]),
            "latency_ms": _distribution([outcome.latency for outcome in done]),
            "peak_memory_bytes": self.peak_memory,
        }


def print_table(runs: Sequence[Run], console: Console) -> None:
    """Print one row per run."""
    table = Table(
        "load", "requests", "failed", "output tok/s", "req/s", "cached",
        "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "latency p50 ms",
    )  # fmt: skip
    for run in runs:
        row = run.summary()
        ttft, tpot = row["ttft_ms"], row["tpot_ms"]
        table.add_row(
            run.label,
            str(row["requests"]),
            str(row["failed"]),
            f"{row['output_tokens_per_second']:.1f}",
            f"{row['requests_per_second']:.2f}",
            f"{row['cached_share']:.0%}",
            f"{ttft['p50']:.0f} / {ttft['p99']:.0f}",
            f"{tpot['p50']:.1f} / {tpot['p99']:.1f}",
            f"{row['latency_ms']['p50']:.0f}",
        )
    console.print(table)
    for run in runs:
        if run.peak_memory:
            console.print(f"{run.label}: peak memory {run.peak_memory / 2**20:.0f} MiB")
        if error := run.summary()["first_error"]:
            console.print(f"{run.label}: first error: {error}", style="red")


def command_line(secrets: Sequence[str]) -> str:
    """Return this process's command line, secrets as asterisks because results are published."""
    arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for secret in filter(None, secrets):
        arguments = [argument.replace(secret, "***") for argument in arguments]
    return shlex.join(arguments)


def write_json(path: Path, runs: Sequence[Run], server: dict[str, Any], command: str) -> None:
    """Write machine, versions, command, and the summary and requests of each run."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(),
        "versions": {"chunkllama": __version__, "python": platform.python_version(), **server},
        "runs": [
            {
                "label": run.label,
                "workload": asdict(run.workload),
                "summary": run.summary(),
                "requests": [_request(run, outcome) for outcome in run.outcomes],
                "occupancy": list(run.occupancy),
            }
            for run in runs
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def describe_machine() -> dict[str, Any]:
    """Return processor, usable processors, memory and load."""
    memory = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            memory = int(line.split()[1]) * 1024
    return {
        "cpu": cpu_name(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def check_output(folder: Path, name: str, plots: bool) -> None:
    """Check, before a measurement, that its results can be written.

    Args:
        name: of the files in the folder, without their endings.

    Raises:
        ConfigError: the folder cannot be written, the name is none of a file, or matplotlib is not
            installed.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"name: {name!r} is not the name of a file; --output names the folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output: cannot write to {folder}: {error.strerror}") from None
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plots: matplotlib is not installed; pip install 'chunkllama[plots]' or leave --plots"
        )


def installed_versions(*names: str) -> dict[str, str]:
    """Return the versions of this package and of those given that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_plots(folder: Path, runs: Sequence[Run], stem: str) -> list[Path]:
    """Plot distributions, occupancy over time, and latency against load for several points."""
    import matplotlib

    matplotlib.use("agg")
    written = [_plot_distributions(folder / f"{stem}-latency.png", runs)]
    if any(run.occupancy for run in runs):
        written.append(_plot_occupancy(folder / f"{stem}-occupancy.png", runs))
    if len(runs) > 1:
        written.append(_plot_load(folder / f"{stem}-load.png", runs))
    return written


def _request(run: Run, outcome: Outcome) -> dict[str, Any]:
    if outcome.error:
        return {"tenant": outcome.tenant, "turn": outcome.turn, "error": outcome.error}
    began = min(each.started for each in run.outcomes)
    return {
        "tenant": outcome.tenant,
        "turn": outcome.turn,
        "at": round(outcome.started - began, 4),
        "ttft": round(outcome.ttft, 4),
        "tpot": round(outcome.tpot, 5),
        "latency": round(outcome.latency, 4),
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.completion_tokens,
    }


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return dict.fromkeys(["mean", *(f"p{p}" for p in _PERCENTILES), "max"], 0.0)
    ordered = sorted(seconds)
    values = {"mean": statistics.fmean(ordered)}
    for percent in _PERCENTILES:
        # Nearest rank: the smallest value that at least this share of values does not exceed.
        values[f"p{percent}"] = ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
    values["max"] = ordered[-1]
    return {name: round(value * 1000, 2) for name, value in values.items()}


def _plot_distributions(path: Path, runs: Sequence[Run]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        done = [outcome for outcome in run.outcomes if not outcome.error]
        for axis, values in (
            (axes[0], sorted(o.ttft * 1000 for o in done)),
            (axes[1], sorted(o.tpot * 1000 for o in done if o.completion_tokens > 1)),
        ):
            share = [(i + 1) / len(values) for i in range(len(values))]
            axis.step(values, share, where="post", label=run.label)
    for axis, name in zip(axes, ("time to first token", "time per output token"), strict=True):
        axis.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_occupancy(path: Path, runs: Sequence[Run]) -> Path:
    from matplotlib import pyplot

    states = ("referenced", "private", "cached", "free")
    sampled = [run for run in runs if run.occupancy]
    figure, axes = pyplot.subplots(
        len(sampled), 1, figsize=(10, 3 * len(sampled)), layout="constrained", squeeze=False
    )
    for axis, run in zip(axes[:, 0], sampled, strict=True):
        times = [sample["at"] for sample in run.occupancy]
        series = [[sample.get(state, 0.0) for sample in run.occupancy] for state in states]
        axis.stackplot(times, series, labels=states, colors=_STATE_COLOURS)
        axis.set(xlabel="seconds", ylabel="chunks", title=run.label)
        axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_load(path: Path, runs: Sequence[Run]) -> Path:
    from matplotlib import pyplot

    by_rate = all(run.workload.rate is not None for run in runs)
    loads = [run.workload.rate if by_rate else run.workload.concurrency for run in runs]
    rows = [run.summary() for run in runs]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for percent in ("p50", "p99"):
        axes[0].plot(loads, [row["latency_ms"][percent] for row in rows], "o-", label=percent)
    axes[0].set(ylabel="latency, ms", ylim=(0, None))
    axes[0].legend()
    axes[1].plot(loads, [row["output_tokens_per_second"] for row in rows], "o-")
    axes[1].set(ylabel="output tokens per second", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="conversations per second" if by_rate else "concurrency")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
