"""Simulate tenants that share system prompts, against any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from chunkllama.errors import ConfigError
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.bench.client import Endpoint, Outcome

_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book
eye job word business issue side kind head house service friend father power hour game line
end member law car city community name president team minute idea body information back
""".split()  # noqa: SIM905


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of a load test.

    Attributes:
        tenants: number of system prompts, each shared by the conversations of its tenant.
        system_tokens, user_tokens, output_tokens: lengths, exact by the model's tokenizer.
        conversations: total number, assigned to the tenants round-robin.
        turns: user messages of a conversation; each sends the whole history.
        concurrency: concurrent conversations (closed loop), ignored with a rate.
        rate: conversations a second, Poisson arrivals (open loop); None is closed loop.
        warm: compute every system prompt before the measurement begins.
    """

    tenants: int = 8
    system_tokens: int = 1024
    user_tokens: int = 64
    output_tokens: int = 64
    conversations: int = 64
    turns: int = 1
    concurrency: int = 16
    rate: float | None = None
    warm: bool = False
    seed: int = 0


@dataclass(slots=True)
class Conversation:
    """One tenant's exchange: when it starts, and what the user says in each turn."""

    tenant: int
    at: float
    system: str
    users: list[str]
    max_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


class PromptMaker:
    """Random English words of an exact length in tokens."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def text(self, num_tokens: int) -> str:
        """Return a text that the tokenizer encodes to exactly ``num_tokens`` ids.

        Raises:
            ConfigError: encoding does not restore the decoded ids.
        """
        for _ in range(100):
            words = " ".join(self._random.choice(_WORDS) for _ in range(num_tokens))
            text = self._tokenizer.decode(self._tokenizer.encode(words)[:num_tokens])
            # A word that is cut may merge differently with the next one.
            if len(self._tokenizer.encode(text)) == num_tokens:
                return text
        raise ConfigError(f"tokenizer: cannot make a text of exactly {num_tokens} tokens")


def make_conversations(workload: Workload, tokenizer: Tokenizer) -> list[Conversation]:
    """Make the workload's conversations, equal for equal seeds."""
    maker = PromptMaker(tokenizer, workload.seed)
    arrivals = random.Random(workload.seed + 1)
    systems = [maker.text(workload.system_tokens) for _ in range(workload.tenants)]
    made, at = [], 0.0
    for number in range(workload.conversations):
        tenant = number % workload.tenants
        users = [maker.text(workload.user_tokens) for _ in range(workload.turns)]
        made.append(Conversation(tenant, at, systems[tenant], users, workload.output_tokens))
        if workload.rate is not None:
            at += arrivals.expovariate(workload.rate)
    return made


def read_trace(path: Path) -> list[Conversation]:
    """Read conversations of a JSONL file, to be sent at the times in the file.

    A line is ``{"at": seconds, "messages": [...], "max_tokens": n, "tenant": n}``; ``at`` defaults
    to 0, ``max_tokens`` to 64; other members are copied to the request.

    Raises:
        ConfigError: the file or a line cannot be used.
    """
    made = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"trace: cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            entry = json.loads(line)
            messages = [*entry.pop("messages")]
            made.append(
                Conversation(
                    tenant=int(entry.pop("tenant", 0)),
                    at=float(entry.pop("at", 0.0)),
                    system="",
                    users=[""],
                    max_tokens=int(entry.pop("max_tokens", 64)),
                    extra={"messages": messages, **entry},
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"trace: {path}, line {number}: {error!r}") from None
    if not made:
        raise ConfigError(f"trace: {path} holds no request")
    return made


class LoadTest:
    """Sends conversations and collects the outcomes of their requests.

    Args:
        endpoint: the server.
        model: name to ask for.
        exact_output: ask for exactly ``max_tokens`` (ignore_eos, min_tokens), where the server
            knows these fields.
        on_outcome: called after each request.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        exact_output: bool = True,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._exact_output = exact_output
        self._on_outcome = on_outcome
        self.outcomes: list[Outcome] = []

    async def run(
        self,
        conversations: list[Conversation],
        *,
        concurrency: int,
        loop: Literal["open", "closed"],
    ) -> float:
        """Send them all; return the seconds from the first request to the last answer.

        An open loop starts each at its time regardless of server load; a closed loop keeps
        ``concurrency`` of them going.
        """
        started = time.monotonic()
        if loop == "open":
            await asyncio.gather(*(self._at(started, c) for c in conversations))
        else:
            waiting = iter(conversations)
            await asyncio.gather(*(self._worker(waiting) for _ in range(concurrency)))
        return time.monotonic() - started

    async def warm_up(self, conversations: list[Conversation]) -> None:
        """Compute each tenant's system prompt, outside the measurement."""
        seen: dict[int, Conversation] = {}
        for conversation in conversations:
            seen.setdefault(conversation.tenant, conversation)
        for conversation in seen.values():
            first = replace(conversation, users=["hello"], max_tokens=1)
            await self._send(first, self._messages(first), Outcome(first.tenant, 0, 0.0))

    async def _at(self, started: float, conversation: Conversation) -> None:
        await asyncio.sleep(max(0.0, started + conversation.at - time.monotonic()))
        await self._converse(conversation)

    async def _worker(self, waiting: Any) -> None:
        for conversation in waiting:
            await self._converse(conversation)

    async def _converse(self, conversation: Conversation) -> None:
        messages = self._messages(conversation)
        for turn, user in enumerate(conversation.users):
            if turn:
                messages.append({"role": "user", "content": user})
            outcome = Outcome(conversation.tenant, turn, 0.0)
            await self._send(conversation, messages, outcome)
            self.outcomes.append(outcome)
            self._on_outcome(outcome)
            if outcome.error:
                return
            messages.append({"role": "assistant", "content": outcome.text})

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        if "messages" in conversation.extra:
            return [*conversation.extra["messages"]]
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        return [*system, {"role": "user", "content": conversation.users[0]}]

    def _send(
        self, conversation: Conversation, messages: list[dict[str, Any]], outcome: Outcome
    ) -> Awaitable[Outcome]:
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": 0.0,
            **conversation.extra,
            "messages": messages,
            "max_tokens": conversation.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._exact_output:
            body |= {"ignore_eos": True, "min_tokens": conversation.max_tokens}
        return self._endpoint.stream("/v1/chat/completions", body, outcome)
