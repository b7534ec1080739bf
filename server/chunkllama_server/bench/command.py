"""Implement ``chunkllama bench``: flags, progress, and the files of a load test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkllama.config import DEMO_MODEL
from chunkllama.digits import whole_number
from chunkllama.errors import ConfigError
from chunkllama.models.loading.hub import resolve_model
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.bench.client import Endpoint, Outcome
from chunkllama_server.bench.monitor import Monitor
from chunkllama_server.bench.report import (
    Run,
    check_output,
    command_line,
    installed_versions,
    print_table,
    write_json,
    write_plots,
)
from chunkllama_server.bench.workload import (
    Conversation,
    LoadTest,
    Workload,
    make_conversations,
    read_trace,
)
from chunkllama_server.console import make_console

bench_app = typer.Typer(no_args_is_help=True, help="Measure a server.")


@bench_app.callback()
def bench() -> None:
    """Keep ``serve`` a subcommand."""


@bench_app.command()
def serve(  # noqa: PLR0913 - one parameter a flag
    url: Annotated[str, typer.Option(help="Server to load, any OpenAI-compatible one.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str, typer.Option(help="Model to ask for. Default: the server's first.")] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Folder or alias whose tokenizer counts the tokens.")
    ] = DEMO_MODEL,
    tenants: Annotated[int, typer.Option(min=1, help="Different system prompts.")] = 8,
    system_tokens: Annotated[int, typer.Option(min=0, help="Length of each system prompt.")] = 1024,
    user_tokens: Annotated[int, typer.Option(min=1, help="Length of each user message.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 64,
    conversations: Annotated[int, typer.Option(min=1, help="Conversations in all.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="User messages of a conversation.")] = 1,
    concurrency: Annotated[
        str, typer.Option(help="Concurrent conversations; several points as 1,4,16.")
    ] = "16",
    rate: Annotated[
        str, typer.Option(help="Conversations a second, Poisson, instead of a concurrency: 1,2,4.")
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(help="JSONL of requests to replay instead: at, messages, ...")
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm/--cold", help="Compute every system prompt beforehand.")
    ] = False,
    exact_output: Annotated[
        bool, typer.Option(help="Send ignore_eos and min_tokens, for answers of exact length.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of texts and arrivals.")] = 0,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key; several are assigned to the tenants round-robin.")
    ] = None,
    pid: Annotated[
        int | None, typer.Option(help="The server's process: measure its tree's peak memory.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results: NAME.json, and plots.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="Base name of the files in the output folder.")
    ] = "load-test",
    plots: Annotated[bool, typer.Option(help="Also write PNG plots.")] = False,
) -> int:
    """Load a server with tenants that share system prompts.

    Exit code 1 if a request fails.
    """
    base = Workload(
        tenants=tenants,
        system_tokens=system_tokens,
        user_tokens=user_tokens,
        output_tokens=output_tokens,
        conversations=conversations,
        turns=turns,
        warm=warm,
        seed=seed,
    )
    if output is not None:
        check_output(output, name, plots)
    elif plots:
        raise ConfigError("plots: give --output, the folder to write them to")
    points = _points(base, concurrency, rate)
    endpoint = Endpoint(url, tuple(api_key or ()))
    console = make_console()
    runs, server = asyncio.run(
        _measure(endpoint, model, points, tokenizer, trace, exact_output, pid)
    )
    print_table(runs, console)
    if output is not None:
        write_json(output / f"{name}.json", runs, server, command_line(api_key or ()))
        written = [output / f"{name}.json"]
        written += write_plots(output, runs, name) if plots else []
        console.print("written:", *map(str, written))
    return 1 if any(outcome.error for run in runs for outcome in run.outcomes) else 0


def _count(text: str) -> int:
    count = whole_number(text.strip())
    if count is None:
        raise ValueError(f"{text!r} is no number")
    return count


def _points(base: Workload, concurrency: str, rate: str) -> list[Workload]:
    """Return one workload per requested load, each with different texts."""
    try:
        if rate:
            points = [replace(base, rate=float(value)) for value in rate.split(",")]
        else:
            points = [replace(base, concurrency=_count(text)) for text in concurrency.split(",")]
    except ValueError:
        raise ConfigError("concurrency, rate: numbers are needed, separated by commas") from None
    loads = [point.concurrency if point.rate is None else point.rate for point in points]
    if not all(0 < load < 1e6 for load in loads):
        raise ConfigError("concurrency, rate: must be above 0 and below 1e6")
    # A later point must not find the earlier one's prompts in the cache.
    return [replace(point, seed=base.seed + 1000 * i) for i, point in enumerate(points)]


async def _measure(
    endpoint: Endpoint,
    model: str,
    points: Sequence[Workload],
    tokenizer: str,
    trace: Path | None,
    exact_output: bool,
    pid: int | None,
) -> tuple[list[Run], dict[str, Any]]:
    server = await _describe_server(endpoint)
    model = model or server["model"]
    counter = None if trace else load_tokenizer(resolve_model(tokenizer, "tokenizer"))
    runs = []
    for point in points:
        if counter is None:
            assert trace is not None
            conversations, label = read_trace(trace), f"trace {trace.name}"
        else:
            conversations = make_conversations(point, counter)
            label = f"rate {point.rate:g}" if point.rate else f"concurrency {point.concurrency}"
        is_open = trace is not None or point.rate is not None
        runs.append(
            await _one_run(endpoint, model, point, conversations, label, is_open, exact_output, pid)
        )
        if trace is not None:
            break
    return runs, server


async def _one_run(
    endpoint: Endpoint,
    model: str,
    workload: Workload,
    conversations: list[Conversation],
    label: str,
    is_open: bool,
    exact_output: bool,
    pid: int | None,
) -> Run:
    total = sum(len(conversation.users) for conversation in conversations)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[failed]} failed"),
    )
    with Progress(*columns, console=make_console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(label, total=total, tokens=0, failed=0)
        tokens = failed = 0

        def show(outcome: Outcome) -> None:
            nonlocal tokens, failed
            tokens += outcome.completion_tokens
            failed += bool(outcome.error)
            progress.update(task, advance=1, tokens=tokens, failed=failed)

        load = LoadTest(endpoint, model, exact_output=exact_output, on_outcome=show)
        if workload.warm:
            await load.warm_up(conversations)
        async with Monitor(endpoint, pid) as monitor:
            seconds = await load.run(
                conversations,
                concurrency=workload.concurrency,
                loop="open" if is_open else "closed",
            )
    return Run(label, workload, load.outcomes, seconds, monitor.occupancy, monitor.peak_memory)


async def _describe_server(endpoint: Endpoint) -> dict[str, Any]:
    """Return the first model's name, and the server's version if it reports one."""
    try:
        status, body = await endpoint.get("/v1/models")
        if status != 200:
            raise ValueError(f"/v1/models answers with status {status}")
        described: dict[str, Any] = {"model": json.loads(body)["data"][0]["id"]}
        status, body = await endpoint.get("/version")
        if status == 200:
            described["server"] = json.loads(body)
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"url: {endpoint.url} is no OpenAI-compatible server: {error}") from None
    return described | installed_versions("torch")
