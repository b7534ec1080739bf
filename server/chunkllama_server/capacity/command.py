"""Implement ``chunkllama capacity``: how many chunks a recorded load needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkllama.config import DEMO_MODEL, EngineConfig, SchedulerConfig
from chunkllama.digits import whole_number
from chunkllama.engine.step_size import MOST, step_tokens
from chunkllama.errors import ConfigError
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.simulation.capacity import Needed, PoolResult, find_needed, summarize
from chunkllama.simulation.cost_model import DEFAULT_COST, StepCost, read_cost
from chunkllama.simulation.replay import Replay
from chunkllama.simulation.trace import Tokenize, TraceRequest, read_trace
from chunkllama_server.bench.report import check_output
from chunkllama_server.capacity.report import print_report, write_plot, write_report
from chunkllama_server.console import make_console

_DEFAULTS = SchedulerConfig()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every replay of one command has in common."""

    requests: Sequence[TraceRequest]
    limits: SchedulerLimits
    chunk_size: int
    cost: StepCost

    def run(self, num_chunks: int) -> PoolResult:
        """Replay the trace with one pool and show the progress on stderr."""
        replay = Replay(self.limits, num_chunks, self.chunk_size, self.cost.seconds)
        with _progress(f"{num_chunks} chunks", len(self.requests)) as advance:
            return summarize(replay.run(self.requests, advance), num_chunks)


@contextlib.contextmanager
def _progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; the block gets a function that sets the number done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=make_console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


def capacity(  # noqa: PLR0913 - one parameter a flag
    trace: Annotated[
        Path | None, typer.Option(help="JSONL of requests: ours or Mooncake's hashed trace.")
    ] = None,
    chunks: Annotated[
        str, typer.Option(help="Chunks in the pool; several pools as 500,1000,2000.")
    ] = "",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the model's cost on this machine first.")
    ] = False,
    cost: Annotated[
        Path | None, typer.Option(help="Cost model: a JSON file that --measure has written.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model to measure, and tokenizer of traces with text.")
    ] = DEMO_MODEL,
    needed: Annotated[
        bool, typer.Option(help="Find the smallest pool that is enough, by more replays.")
    ] = True,
    target: Annotated[
        float, typer.Option(help="Share of the best hit rate that is enough, in (0, 1].")
    ] = 0.95,
    rate: Annotated[
        float, typer.Option(help="Speed of arrivals: 2 replays the trace in half its time.")
    ] = 1.0,
    limit: Annotated[int, typer.Option(min=0, help="Requests to read; 0 is all.")] = 0,
    chunk_size: Annotated[int, typer.Option(min=1, max=4096, help="Tokens a chunk holds.")] = 64,
    max_model_len: Annotated[
        int, typer.Option(min=1, help="Longest prompt plus answer in tokens.")
    ] = 1 << 20,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, max=256, help="Sequences that run at once.")
    ] = _DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of one step. Default: a server's choice if a token takes so long.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; one more is refused with 429.")
    ] = _DEFAULTS.max_waiting,
    scheduling_policy: Annotated[
        str, typer.Option(help="Order of waiting requests: fair, prefix or fcfs.")
    ] = _DEFAULTS.scheduling_policy,
    fair_quantum: Annotated[
        int, typer.Option(min=1, help="Tokens that a group or a tenant may run ahead.")
    ] = _DEFAULTS.fair_quantum,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results: NAME.json, NAME-cost.json, plots.")
    ] = None,
    name: Annotated[str, typer.Option(help="Base name of the files.")] = "capacity",
    plots: Annotated[bool, typer.Option(help="Also write a PNG plot.")] = False,
) -> int:
    """Say what a pool of chunks gives for a recorded load.

    A trace is replayed through the real scheduler, without a model.
    """
    if trace is None and not measure:
        raise ConfigError("trace: give --trace FILE, or --measure to measure the cost model alone")
    if cost is not None and measure:
        raise ConfigError("cost: give --cost or --measure, not both")
    _check_numbers(target, rate)
    pools = _pools(chunks)
    if output is not None:
        check_output(output, name, plots)
    elif plots:
        raise ConfigError("plots: give --output, the folder to write them to")
    limits = _limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens or MOST,
        max_waiting=max_waiting,
        policy=scheduling_policy,
        fair_quantum=fair_quantum,
    )
    requests = [] if trace is None else _read(trace, model, limit, rate)
    costs, source = _cost(cost, measure, model, chunk_size)
    if max_num_batched_tokens is None:
        tokens = step_tokens(costs.token, max_num_seqs)
        limits = replace(limits, max_num_batched_tokens=tokens)
    console = make_console()
    written = []
    if output is not None and measure:
        written.append(_write_cost(output / f"{name}-cost.json", costs, source))
    if not requests:
        console.print(_describe(costs, source))
    else:
        plan = Plan(requests=requests, limits=limits, chunk_size=chunk_size, cost=costs)
        results = [plan.run(size) for size in pools]
        found = None
        if needed or not pools:
            found = find_needed(plan.run, requests, chunk_size, max_model_len, target)
        print_report(console, results, found, chunk_size, _describe(costs, source))
        if output is not None:
            written += _write(output, name, plots, results, found, plan, source)
    if written:
        console.print("written:", *map(str, written))
    return 0


def _check_numbers(target: float, rate: float) -> None:
    if not 0 < target <= 1:
        raise ConfigError(f"target: must be in (0, 1], got {target:g}")
    if not 0 < rate < 1e6:
        raise ConfigError(f"rate: must be in (0, 1e6), got {rate:g}")


def _pools(text: str) -> list[int]:
    pools = [whole_number(part.strip()) or 0 for part in text.split(",") if part.strip()]
    if any(not 1 <= size <= 10**8 for size in pools):
        raise ConfigError(f"chunks: give numbers of at least 1, separated by commas, got {text!r}")
    return sorted(set(pools))


def _limits(
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_waiting: int,
    policy: str,
    fair_quantum: int,
) -> SchedulerLimits:
    policies: dict[str, Literal["fair", "prefix", "fcfs"]] = {
        "fair": "fair",
        "prefix": "prefix",
        "fcfs": "fcfs",
    }
    if policy not in policies:
        raise ConfigError(f"scheduling_policy: must be fair, prefix or fcfs, got {policy!r}")
    return SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        policy=policies[policy],
        fair_quantum=fair_quantum,
        max_tenant_slowdown=_DEFAULTS.max_tenant_slowdown,
        max_step_seconds=_DEFAULTS.max_step_seconds,
        min_wait_tokens=_DEFAULTS.min_wait_tokens,
        enable_prefix_caching=True,
    )


def _read(trace: Path, model: str, limit: int, rate: float) -> list[TraceRequest]:
    requests = read_trace(trace, _LazyTokenize(model), limit=limit or None)
    first = requests[0].at
    return [replace(request, at=(request.at - first) / rate) for request in requests]


class _LazyTokenize:
    """Tokenizes lines with text; loads the tokenizer at the first one."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._encode: Tokenize | None = None

    def __call__(self, entry: dict[str, Any]) -> list[int]:
        if self._encode is None:
            self._encode = self._load()
        return self._encode(entry)

    def _load(self) -> Tokenize:
        from chunkllama.models.loading.hub import resolve_model
        from chunkllama.text.chat_template import load_chat_template
        from chunkllama.text.tokenizer import load_tokenizer

        path = resolve_model(self._model)
        tokenizer = load_tokenizer(path)
        template = load_chat_template(path, tokenizer, None)

        def encode(entry: dict[str, Any]) -> list[int]:
            if "messages" not in entry:
                return tokenizer.encode(entry["prompt"])
            if template is None:
                raise ValueError(f"{self._model} has no chat template")
            return template.encode(entry["messages"])

        return encode


def _cost(
    file: Path | None, measure: bool, model: str, chunk_size: int
) -> tuple[StepCost, dict[str, Any]]:
    """Return the cost model, and where it comes from."""
    if file is not None:
        return read_cost(file), {"from": file.name}
    if not measure:
        return DEFAULT_COST, {"from": "built in: the demo model on two cores with AMX"}
    from chunkllama.simulation.measure import measure_cost

    config = EngineConfig.from_flat(model=model, chunk_size=chunk_size)
    with _progress("measuring", None) as advance:
        measured = measure_cost(config, lambda done, total: advance(done))
    return measured.cost, {
        "from": "measured",
        "model": measured.engine.model_name,
        "backend": f"{measured.engine.backend} {measured.engine.isa_level}".strip(),
        "steps": measured.num_steps,
        "median_error": round(measured.error, 4),
    }


def _describe(cost: StepCost, source: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value:.3g}" for name, value in cost.as_dict().items())
    error = source.get("median_error")
    accuracy = "" if error is None else f", median error {error:.0%} of {source['steps']} steps"
    return f"cost model in seconds ({source['from']}{accuracy}): {parts}"


def _write_cost(path: Path, cost: StepCost, source: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"seconds": cost.as_dict(), "source": source}, indent=2) + "\n")
    return path


def _write(
    folder: Path,
    name: str,
    plots: bool,
    results: list[PoolResult],
    found: Needed | None,
    plan: Plan,
    source: dict[str, Any],
) -> list[Path]:
    settings = {
        "chunk_size": plan.chunk_size,
        "max_num_seqs": plan.limits.max_num_seqs,
        "max_num_batched_tokens": plan.limits.max_num_batched_tokens,
        "max_waiting": plan.limits.max_waiting,
        "scheduling_policy": plan.limits.policy,
        "fair_quantum": plan.limits.fair_quantum,
        "cost": {"seconds": plan.cost.as_dict(), "source": source},
    }
    written = [write_report(folder / f"{name}.json", results, found, settings)]
    if plots:
        written.append(write_plot(folder / f"{name}.png", results, found))
    return written
