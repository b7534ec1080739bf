"""Send 16 concurrent requests of one tenant; the server computes their system prompt once.

python examples/many_tenants.py [URL]
"""

from __future__ import annotations

import asyncio
import sys

import httpx
from openai import AsyncOpenAI

METRIC = "chunkllama_prefill_tokens_computed_total"


async def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    model = (await client.models.list()).data[0].id
    system = "You are the assistant of Example Corp. Be brief, be kind, never guess. " * 6
    before = await computed_tokens(url)
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model=model,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"I am customer {number}. Who are you?"},
                ],
                max_tokens=8,
                temperature=0,
            )
            for number in range(16)
        )
    )
    sent = sum(answer.usage.prompt_tokens for answer in answers if answer.usage)
    print(f"{sent} prompt tokens sent, {await computed_tokens(url) - before:.0f} computed")


async def computed_tokens(url: str) -> float:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/metrics")  # with --admin-port it is there alone
    lines = answer.raise_for_status().text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"{METRIC} "))


if __name__ == "__main__":
    asyncio.run(main())
