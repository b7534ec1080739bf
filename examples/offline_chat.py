"""Answer several questions in one batch in this process; their system prompt is computed once.

python examples/offline_chat.py [MODEL]
"""

from __future__ import annotations

import sys

from chunkllama import LLM, SamplingParams

QUESTIONS = ("What is the capital of France?", "What is two plus two?", "Name a large animal.")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    llm = LLM(model, num_chunks=64)
    rules = "Answer in one short sentence. Use plain words. If you do not know it, say so. " * 4
    system = {"role": "system", "content": f"You are a helpful assistant. {rules}"}
    chats = [[system, {"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=24))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        cached = f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} tokens cached"
        print(f"{question}\n  {output.outputs[0].text}\n  ({cached})")
    llm.close()


if __name__ == "__main__":
    main()
