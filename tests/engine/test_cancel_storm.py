"""Storms of cancelled and repeated requests over prefixes at the bounds of chunks.

A fuzzer found corrupted K/V in two other engines with requests that share a prefix and are
cancelled after some milliseconds and sent again (vLLM #37076, #39146; SGLang #22819, #23392).
"""

from __future__ import annotations

import asyncio
import random

import pytest

from chunkllama.engine.client import InProcessEngineClient
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
MARGIN = 1e-3  # of an oracle's token before the next one; rounding cannot turn it


def make_prompts() -> list[list[int]]:
    rng = random.Random(4)
    stem = [rng.randrange(3, 300) for _ in range(2 * CHUNK)]
    return [
        stem[:length] + [rng.randrange(3, 300) for _ in range(own)]
        for length in LENGTHS
        for own in (0, 1, 2, 40)
    ]


def request(name: str, prompt: list[int], **fields: object) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=1, **fields)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)


async def oracle(client: InProcessEngineClient) -> list[tuple[list[int], list[int]]]:
    """Prompts and their tokens, each alone; without prompts of which two tokens nearly tie."""
    right = []
    for number, prompt in enumerate(make_prompts()):
        tokens, margins = [], []
        async for delta in client.generate(request(f"o{number}", prompt, logprobs=2)):
            for choice in delta.choices:
                tokens += choice.token_ids
                margins += [e.top[0][1] - e.top[1][1] for e in choice.logprobs or []]
        if min(margins) > MARGIN:
            right.append((prompt, tokens))
    assert len(right) >= 10
    return right


async def storm(client, right: list[tuple[list[int], list[int]]], seed: int, count: int) -> None:
    """``count`` requests at once: cancelled after 0 to 30 ms, up to three times, then awaited."""
    rng = random.Random(seed)

    async def tokens_of(name: str, prompt: list[int], got: list[int]) -> None:
        async for delta in client.generate(request(name, prompt)):
            for choice in delta.choices:
                got += choice.token_ids

    async def insist(number: int) -> None:
        prompt, expected = rng.choice(right)
        for attempt in range(rng.randrange(4)):
            got: list[int] = []
            try:
                async with asyncio.timeout(rng.random() * 0.03):
                    await tokens_of(f"{seed}-{number}-{attempt}", prompt, got)
            except TimeoutError:
                assert got == expected[: len(got)]
        got = []
        await tokens_of(f"{seed}-{number}-last", prompt, got)
        assert got == expected, (seed, number, prompt)

    await asyncio.gather(*(insist(number) for number in range(count)))
    while (stats := await client.stats()).requests_running or stats.requests_waiting:
        await asyncio.sleep(0)
    assert stats.chunks_private == stats.chunks_referenced == stats.invariant_violations == 0
    assert stats.chunks_free + stats.chunks_cached == stats.chunks_total


def run_storms(tiny_core, seeds: range, count: int) -> None:
    async def scenario() -> None:
        alone = InProcessEngineClient(tiny_core(num_chunks=16, enable_prefix_caching=False))
        right = await oracle(alone)
        await alone.close()
        # room for about six sequences: storms also preempt and evict
        client = InProcessEngineClient(tiny_core(num_chunks=24, max_waiting=2000))
        for seed in seeds:
            await storm(client, right, seed, count)
        await client.close()

    asyncio.run(scenario())


def test_storms(tiny_core) -> None:
    run_storms(tiny_core, range(50), 12)


@pytest.mark.nightly
def test_many_storms(tiny_core) -> None:
    run_storms(tiny_core, range(1000, 2000), 50)
