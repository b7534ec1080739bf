"""Prompts over shared prefixes under memory pressure, sent over HTTP to a real server."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

SIZE = 64
PREFIXES, PROMPTS, PREFIX_TOKENS, OWN_TOKENS = 16, 96, 8 * SIZE, 5


def test_96_prompts_over_16_prefixes_compute_each_prefix_once(start) -> None:
    """They arrive while the engine is stopped; the pool holds four of the prefixes."""
    served = start("--num-chunks", 40, "--engine-hang-seconds", 600)
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    prefixes = [tokens(PREFIX_TOKENS) for _ in range(PREFIXES)]
    prompts = [prefixes[i % PREFIXES] + tokens(OWN_TOKENS) for i in range(PROMPTS)]

    def metric(name: str) -> int:
        text = http.get("/metrics").text
        (line,) = re.findall(rf"^chunkllama_{name} (\S+)$", text, re.MULTILINE)
        return int(float(line))

    def send(prompt: list[int]) -> httpx.Response:
        body = {"model": served.model, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        return http.post("/v1/completions", json=body)

    limits = httpx.Limits(max_connections=None)
    http = httpx.Client(base_url=served.url, timeout=120, limits=limits)
    with http, ThreadPoolExecutor(PROMPTS) as pool:
        with served.paused_engine():
            answers = [pool.submit(send, prompt) for prompt in prompts]
            while metric("requests_live") < PROMPTS:
                time.sleep(0.02)
        usages = [answer.result().json()["usage"] for answer in answers]
        computed = metric("prefill_tokens_computed_total")
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert computed == PROMPTS * (PREFIX_TOKENS + OWN_TOKENS) - cached
    assert computed <= 1.2 * (PREFIXES * PREFIX_TOKENS + PROMPTS * OWN_TOKENS)
