"""Play tenants that share system prompts, and show what sharing saves while they talk."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chunkllama.config import DEMO_MODEL
from chunkllama.errors import ChunkLlamaError
from chunkllama_server.bench.client import Endpoint, Outcome
from chunkllama_server.console import make_console
from chunkllama_server.process.health_check import check_health

_WIDE = 110  # columns of a terminal from which on answers are shown
_START_SECONDS = 600.0  # the first start downloads the demo model

_TENANTS = (
    ("Alder Bakery", "a bakery"),
    ("Birch Bank", "a savings bank"),
    ("Cedar Clinic", "a family clinic"),
    ("Dogwood Tours", "a travel agency"),
    ("Elm Books", "a bookshop"),
    ("Fir Motors", "a car repair shop"),
    ("Ginkgo Garden", "a plant nursery"),
    ("Hazel Hotel", "a hotel by a lake"),
)
_RULES = (
    "Answer in one or two short sentences and use plain words.",
    "Opening hours are from nine to six on weekdays and from ten to two on Saturdays.",
    "Prices are in euros and include tax; never promise a discount.",
    "An order can be cancelled free of charge until the evening before it is due.",
    "Complaints are answered with an apology and the address of the service desk.",
    "If you do not know an answer, say so and offer a call back within one working day.",
    "A refund is paid to the account that was used for the purchase, within ten days.",
    "Parking is free behind the building; the entrance is next to the post office.",
)
_QUESTIONS = (
    "When do you open on Saturday?",
    "Can I cancel my order?",
    "Where can I park my car?",
    "How long does a refund take?",
    "Do you give a discount to students?",
    "I want to complain about my last visit.",
    "What can you do for me?",
    "Are your prices with tax?",
)

demo_app = typer.Typer(no_args_is_help=True, help="Show what sharing prompts saves.")


@demo_app.callback()
def demo() -> None:
    """Keep ``tenants`` a subcommand."""


@demo_app.command()
def tenants(
    url: Annotated[
        str, typer.Option(help="Server to use. One is started for the demo if none answers there.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model to start a server with.")] = DEMO_MODEL,
    requests: Annotated[
        int, typer.Option(min=1, max=100, help="Questions that each of the 8 tenants asks.")
    ] = 4,
    api_key: Annotated[str, typer.Option(help="Key, if the server needs one.")] = "",
) -> int:
    """Let 8 tenants ask questions over their own system prompts.

    Exit code 1 if a request fails.
    """
    console = make_console()
    endpoint = Endpoint(url, (api_key,) if api_key else ())
    if not check_health(url, timeout=2.0):
        return _play(endpoint, requests, console)
    with _server(model, console) as own:
        return _play(Endpoint(own), requests, console)


@dataclass(slots=True)
class _Tenant:
    """What one tenant has sent and received so far."""

    name: str
    system: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def answered(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ended and not outcome.error]

    def row(self) -> list[str]:
        answered = self.answered
        sent = sum(outcome.prompt_tokens for outcome in answered)
        cached = sum(outcome.cached_tokens for outcome in answered)
        first = [outcome.ttft for outcome in answered]
        text = " ".join(self.outcomes[-1].text.split()) if self.outcomes else ""
        return [
            self.name,
            f"{len(answered)}",
            f"{sent:,}",
            f"{sent - cached:,}",
            f"{first[0] * 1e3:.0f}" if first else "",
            f"{min(first[1:]) * 1e3:.0f}" if first[1:] else "",
            text,
        ]


def _play(endpoint: Endpoint, requests: int, console: Console) -> int:
    players = [
        _Tenant(name, _system_prompt(name, trade, number))
        for number, (name, trade) in enumerate(_TENANTS)
    ]
    asyncio.run(_run(endpoint, players, requests, console))
    failed = [o.error for player in players for o in player.outcomes if o.error]
    answered = [o for player in players for o in player.answered]
    sent = sum(outcome.prompt_tokens for outcome in answered)
    computed = sent - sum(outcome.cached_tokens for outcome in answered)
    console.print(
        f"{sent:,} prompt tokens sent, {computed:,} computed: sharing saved "
        f"{1 - computed / max(sent, 1):.0%} of the prefill work."
    )
    if failed:
        console.print(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return 1 if failed else 0


async def _run(endpoint: Endpoint, players: list[_Tenant], requests: int, console: Console) -> None:
    """Ask everything; tenants run concurrently, each asks one question after the other."""
    model = json.loads((await endpoint.get("/v1/models"))[1])["data"][0]["id"]
    with Live(console=console, auto_refresh=False) as live:
        talks = [asyncio.create_task(_talk(endpoint, model, p, requests)) for p in players]
        pending: set[asyncio.Task[None]] = set(talks)
        while pending:
            _, pending = await asyncio.wait(pending, timeout=0.25)
            live.update(_table(players, console.width), refresh=True)
        for talk in talks:
            talk.result()
    console.print()


async def _talk(endpoint: Endpoint, model: str, player: _Tenant, requests: int) -> None:
    for number in range(requests):
        outcome = Outcome(tenant=0, turn=number, started=time.monotonic())
        player.outcomes.append(outcome)
        body = {
            "model": model,
            "messages": [
                {"role": "system", "content": player.system},
                {"role": "user", "content": _QUESTIONS[number % len(_QUESTIONS)]},
            ],
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await endpoint.stream("/v1/chat/completions", body, outcome)


def _table(players: list[_Tenant], width: int) -> Table:
    table = Table(title="8 tenants, each with its own system prompt", expand=True)
    table.add_column("tenant", min_width=13)
    for heading in ("answers", "tokens sent", "computed", "first TTFT ms", "best later ms"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    is_wide = width >= _WIDE
    if is_wide:
        table.add_column("latest answer", no_wrap=True, overflow="ellipsis", ratio=1)
    for player in players:
        *cells, text = player.row()
        table.add_row(*cells, *([text] if is_wide else []))
    return table


def _system_prompt(name: str, trade: str, number: int) -> str:
    """Return about 150 tokens; the rules' order differs, so tenants share only a few tokens."""
    rules = _RULES[number:] + _RULES[:number]
    return " ".join([f"{name} is {trade}. You answer its customers.", *rules])


@contextmanager
def _server(model: str, console: Console) -> Iterator[str]:
    """Serve a model on a free port of this machine until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "chunkllama_server.cli", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model", model]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            with console.status(Text(f"starting a server with {model}")):
                _wait(server, url, log)
            yield url
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while check_health(url, timeout=1.0):
        if server.poll() is not None:
            last = (log.read_text(errors="replace").splitlines() or [""])[-1]
            raise ChunkLlamaError(f"the server did not start: {last}")
        if time.monotonic() > deadline:
            raise ChunkLlamaError(f"the server is not ready after {_START_SECONDS:.0f} s")
        time.sleep(0.2)
