"""Stream a conversation with the openai client and print how much of each prompt was cached.

python examples/stream_chat.py [URL]
"""

from __future__ import annotations

import sys
from typing import Any

from openai import OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    system = "You are a patient teacher of geography who explains in simple words. " * 4
    messages: list[Any] = [{"role": "system", "content": system}]
    for question in ("What is the capital of France?", "And what is the capital of Italy?"):
        print("?", question)
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=48,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        answer = ""
        for chunk in stream:
            if chunk.choices:
                part = chunk.choices[0].delta.content or ""
                answer += part
                print(part, end="", flush=True)
            elif chunk.usage and chunk.usage.prompt_tokens_details:
                details = chunk.usage.prompt_tokens_details
                print(f"\n  {details.cached_tokens} of {chunk.usage.prompt_tokens} tokens cached")
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
