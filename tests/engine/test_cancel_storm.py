"""Storms of cancelled and repeated requests over prefixes at the bounds of chunks.

A fuzzer found corrupted K/V in two other engines with requests that share a prefix and are
cancelled after some milliseconds and sent again (vLLM #37076, #39146; SGLang #22819, #23392).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from soak_client import draw_margin

from chunkllama.engine.in_process import InProcessEngineClient
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
MARGIN = 1e-3  # of an oracle's token before the next one; rounding cannot turn it
NEAR_TIE = 1e-4  # a draw closer than this may turn: fp32 sums depend on how steps cut a prompt
TEMPERATURE = 0.8


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt, how it is sampled (0 is greedy), and its tokens on an undisturbed engine."""

    prompt: list[int]
    temperature: float
    seed: int
    tokens: list[int]


@dataclass
class Count:
    """Answers compared with the oracle, and positions where a draw was nearly a tie."""

    greedy: int = 0
    sampled: int = 0
    near_ties: list[float] = field(default_factory=list)


def make_prompts() -> list[list[int]]:
    rng = random.Random(4)
    stem = [rng.randrange(3, 300) for _ in range(2 * CHUNK)]
    return [
        stem[:length] + [rng.randrange(3, 300) for _ in range(own)]
        for length in LENGTHS
        for own in (0, 1, 2, 40)
    ]


def request(name: str, prompt: list[int], **fields: object) -> EngineRequest:
    defaults = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "seed": 1}
    sampling = SamplingParams(**{**defaults, **fields})
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)


class Oracle:
    """An engine without a cache that computes one request at a time."""

    def __init__(self, client: InProcessEngineClient) -> None:
        self._client = client
        self._number = 0

    async def cases(self) -> list[Case]:
        """Each prompt greedy and sampled; without prompts of which two tokens nearly tie."""
        cases = []
        for prompt in make_prompts():
            tokens, margins = await self._answer(prompt, logprobs=2)
            if min(margins) > MARGIN:
                cases.append(Case(prompt, 0.0, 1, tokens))
            for seed in (len(prompt), 2**40 + len(prompt)):
                tokens, _ = await self._answer(prompt, temperature=TEMPERATURE, seed=seed)
                cases.append(Case(prompt, TEMPERATURE, seed, tokens))
        assert sum(case.temperature == 0 for case in cases) >= 10
        return cases

    async def _answer(self, prompt: list[int], **fields: object) -> tuple[list[int], list[float]]:
        tokens, margins = [], []
        self._number += 1
        async for delta in self._client.generate(request(f"o{self._number}", prompt, **fields)):
            for choice in delta.choices:
                tokens += choice.token_ids
                margins += [e.top[0][1] - e.top[1][1] for e in choice.logprobs or []]
        return tokens, margins

    async def margin(self, case: Case, at: int, token: int) -> float:
        """By how much ``case.tokens[at]`` won the draw against ``token``."""
        logprobs = {}
        for candidate in (case.tokens[at], token):
            self._number += 1
            prompt = [*case.prompt, *case.tokens[:at], candidate]
            scored = request(f"m{self._number}", prompt, max_tokens=1, prompt_logprobs=0)
            entries = []
            async for delta in self._client.generate(scored):
                entries += delta.prompt_logprobs or []
            logprobs[candidate] = entries[-1].logprob
        return draw_margin(case.seed, case.temperature, 0, at, logprobs)


async def check(oracle: Oracle, case: Case, got: list[int], count: Count) -> None:
    """``got`` begins as the oracle's tokens do; a sampled one may leave them at a near tie."""
    if case.temperature:
        count.sampled += 1
    else:
        count.greedy += 1
    expected = case.tokens[: len(got)]
    if got == expected:
        return
    assert case.temperature, (case, got)
    at = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    margin = await oracle.margin(case, at, got[at])
    assert margin < NEAR_TIE, (case, got, margin)
    count.near_ties.append(margin)


async def storm(
    client: InProcessEngineClient, oracle: Oracle, cases: list[Case], seed: int, num_requests: int
) -> Count:
    """Requests at once: cancelled after 0 to 30 ms, up to three times, then awaited."""
    rng = random.Random(seed)
    answers: list[tuple[Case, list[int]]] = []

    async def tokens_of(name: str, case: Case, got: list[int]) -> None:
        fields = {"temperature": case.temperature, "seed": case.seed}
        async for delta in client.generate(request(name, case.prompt, **fields)):
            for choice in delta.choices:
                got += choice.token_ids

    async def insist(number: int) -> None:
        case = rng.choice(cases)
        for attempt in range(rng.randrange(4)):
            got: list[int] = []
            answers.append((case, got))
            try:
                async with asyncio.timeout(rng.random() * 0.03):
                    await tokens_of(f"{seed}-{number}-{attempt}", case, got)
            except TimeoutError:
                pass
        got = []
        await tokens_of(f"{seed}-{number}-last", case, got)
        assert len(got) == 12, (seed, number)
        answers.append((case, got))

    await asyncio.gather(*(insist(number) for number in range(num_requests)))
    while (stats := await client.stats()).requests_running or stats.requests_waiting:
        await asyncio.sleep(0)
    assert stats.chunks_private == stats.chunks_referenced == stats.invariant_violations == 0
    assert stats.chunks_free + stats.chunks_cached == stats.chunks_total
    count = Count()
    for case, got in answers:
        await check(oracle, case, got, count)
    return count


def run_storms(tiny_core, seeds: range, num_requests: int) -> None:
    async def scenario() -> list[Count]:
        alone = InProcessEngineClient(tiny_core(num_chunks=16, enable_prefix_caching=False))
        oracle = Oracle(alone)
        cases = await oracle.cases()
        # room for about six sequences: storms also preempt and evict
        client = InProcessEngineClient(tiny_core(num_chunks=24, max_waiting=2000))
        counts = [await storm(client, oracle, cases, seed, num_requests) for seed in seeds]
        await client.close()
        await alone.close()
        return counts

    counts = asyncio.run(scenario())
    greedy, sampled = sum(c.greedy for c in counts), sum(c.sampled for c in counts)
    near_ties = [margin for c in counts for margin in c.near_ties]
    print(f"\n{greedy} greedy answers, {sampled} sampled ones, near ties {near_ties}")
    assert greedy > len(counts) and sampled > len(counts)
    assert len(near_ties) <= max(1, sampled // 100)


def test_S31_storms(tiny_core) -> None:
    run_storms(tiny_core, range(50), 12)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(1000, 2000, 100))
def test_many_storms(tiny_core, first, child_environment) -> None:
    first += 1000 * int(child_environment["CHUNKLLAMA_TEST_SEED"])
    run_storms(tiny_core, range(first, first + 100), 50)
