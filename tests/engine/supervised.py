"""Requests to a supervised engine, and all that their callers get."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from chunkllama.engine.supervisor import SupervisedEngineClient
from chunkllama.messages import EngineRequest, TokenLogprob
from chunkllama.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9] * 20


def request(name: str, prompt: list[int] = PROMPT, **fields: object) -> EngineRequest:
    sampling = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "seed": 3}
    sampling |= {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__struct_fields__}
    params = SamplingParams(**sampling)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=params, **fields)


@dataclass
class Answer:
    """Everything that a caller of ``generate`` has got."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_prompt_logprobs: int = 0
    embedding: list[float] | None = None
    cached: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    decode_seconds: list[float] = field(default_factory=list)


async def collect(
    client: SupervisedEngineClient, wanted: EngineRequest, answer: Answer | None = None
) -> Answer:
    answer = answer or Answer()
    async for delta in client.generate(wanted):
        answer.cached.add(delta.num_cached_tokens)
        answer.written.add(delta.num_cache_write_tokens)
        answer.decode_seconds.append(delta.decode_seconds)
        answer.num_prompt_logprobs += len(delta.prompt_logprobs or [])
        answer.embedding = delta.embedding or answer.embedding
        for choice in delta.choices:
            assert choice.index not in answer.reasons, "a delta after the choice's end"
            answer.tokens.setdefault(choice.index, []).extend(choice.token_ids)
            answer.logprobs.setdefault(choice.index, []).extend(choice.logprobs or [])
            if choice.finish_reason is not None:
                answer.reasons[choice.index] = choice.finish_reason
    return answer


def check_same(answer: Answer, undisturbed: Answer) -> None:
    assert answer.tokens == undisturbed.tokens
    assert answer.reasons == undisturbed.reasons
    assert answer.num_prompt_logprobs == undisturbed.num_prompt_logprobs
    assert len(answer.cached) == len(answer.written) == 1, "usage changed in the stream"
    assert sorted(answer.decode_seconds) == answer.decode_seconds
    for index, entries in undisturbed.logprobs.items():
        assert [e.token_id for e in answer.logprobs[index]] == [e.token_id for e in entries]
        assert [e.logprob for e in answer.logprobs[index]] == pytest.approx(
            [e.logprob for e in entries], abs=1e-3
        )
    assert answer.embedding == pytest.approx(undisturbed.embedding, abs=1e-4)


async def gained(streams: list[tuple[Answer, asyncio.Task[Answer]]], count: int) -> None:
    """Wait until every live stream has at least ``count`` tokens."""
    while not all(
        task.done() or sum(map(len, answer.tokens.values())) >= count for answer, task in streams
    ):
        await asyncio.sleep(0.001)
