"""A client that keeps what a stream sends, and the requests that a soak repeats.

Standard library only, except for the Gumbel numbers of a draw.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

MODEL = "tiny"
CHUNK = 64
PREFIXES = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
KINDS = ("greedy", "sampled", "choices", "logprobs", "stop", "grammar", "chat")
NEAR_TIE = 1e-4


@dataclass(frozen=True, eq=False)
class Case:
    """One request; ``path`` and ``body`` as they are sent, streamed."""

    name: str
    kind: str
    path: str
    body: dict[str, Any]

    @property
    def is_sampled(self) -> bool:
        return self.body["temperature"] > 0


@dataclass
class Answer:
    """Everything a stream has sent.

    Attributes:
        status: of HTTP; 0 if the connection ended before it came.
        tokens, reasons: by choice.
        error: the body of a refusal, or of an error event.
        gaps: seconds between two events of output.
        silence: the longest time without any byte, comment lines included.
    """

    status: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    is_done: bool = False
    comments: int = 0
    gaps: list[float] = field(default_factory=list)
    silence: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def make_cases(seed: int, count: int, max_tokens: int) -> list[Case]:
    """``count`` requests of all kinds; many share prefixes around the bounds of chunks."""
    rng = random.Random(seed)
    stems = {length: [rng.randrange(32, 127) for _ in range(length)] for length in PREFIXES}
    return [_make_case(rng, number, stems, max_tokens) for number in range(count)]


def _make_case(
    rng: random.Random, number: int, stems: dict[int, list[int]], max_tokens: int
) -> Case:
    kind = KINDS[number % len(KINDS)]
    own = [rng.randrange(32, 127) for _ in range(rng.choice((1, 2, 5, 30)))]
    prompt = stems[rng.choice(PREFIXES)] + own
    body: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "seed": rng.randrange(2**31),
        "max_tokens": rng.randrange(max_tokens // 2, max_tokens + 1),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "ignore_eos": True,
    }
    path = "/v1/completions"
    if kind == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": bytes(prompt).decode()}]
        return Case(f"{kind}-{number}", kind, path, body)
    body["prompt"] = prompt
    if kind in ("sampled", "choices"):
        body["temperature"] = 0.8
    if kind == "choices":
        body["n"] = 2
    if kind == "logprobs":
        body |= {"logprobs": 2, "return_tokens_as_token_ids": True}
    if kind == "stop":
        body["stop"] = [rng.choice("abcdefghij")]
    if kind == "grammar":
        body["structured_outputs"] = {"regex": "[a-z]{40}"}
        body["max_tokens"] = max(body["max_tokens"], 60)
        body["ignore_eos"] = False
    return Case(f"{kind}-{number}", kind, path, body)


async def ask(
    port: int, path: str, body: dict[str, Any], answer: Answer, *, stop_after: int = 0
) -> Answer:
    """Send one request and read its answer, into ``answer``, as it comes.

    Args:
        stop_after: leave when so many tokens have come; 0 reads to the end.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(
            f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw
        )
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        answer.status = int(lines[0].split()[1])
        if "transfer-encoding: chunked" not in lines:
            answer.error = json.loads(await reader.read()).get("error")
            return answer
        await _read_events(reader, answer, stop_after)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # is_done says that the answer is not whole
    finally:
        writer.transport.abort()
    return answer


async def _read_events(reader: asyncio.StreamReader, answer: Answer, stop_after: int) -> None:
    last = heard = time.monotonic()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        sent = (await reader.readexactly(size + 2))[:-2]
        now = time.monotonic()
        answer.silence = max(answer.silence, now - heard)
        heard = now
        assert sent.endswith(b"\n\n"), "a part of an event"
        for event in sent[:-2].split(b"\n\n"):
            assert not answer.is_done, "something follows [DONE]"
            if event.startswith(b":"):
                answer.comments += 1
                continue
            answer.gaps.append(now - last)
            last = now
            if event == b"data: [DONE]":
                answer.is_done = True
            else:
                _take(answer, json.loads(event.removeprefix(b"data: ")))
            if stop_after and answer.num_tokens >= stop_after:
                return


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event["error"]
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        index = choice["index"]
        assert index not in answer.reasons, "a delta behind the choice's end"
        content = choice.get("text")
        if content is None:
            content = choice.get("delta", {}).get("content")
        answer.text[index] = answer.text.get(index, "") + (content or "")
        answer.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
        logprobs = choice.get("logprobs") or {}
        answer.logprobs.setdefault(index, []).extend(logprobs.get("token_logprobs") or [])
        if choice.get("finish_reason"):
            answer.reasons[index] = choice["finish_reason"]


def draw_margin(
    seed: int, temperature: float, choice: int, position: int, logprobs: dict[int, float]
) -> float:
    """By how much one token won the draw against another.

    Args:
        logprobs: of the two tokens at this position, at temperature 1.
    """
    import numpy as np

    from chunkllama.backends.philox import gumbels

    scores = []
    for token, logprob in logprobs.items():
        block, place = divmod(token, 256)
        lanes = np.arange(block * 64, block * 64 + 64)[None, :]
        numbers = gumbels([seed], [choice], [position], 1, lanes)
        scores.append(logprob / temperature + float(numbers[0, place]))
    return abs(scores[0] - scores[1])
