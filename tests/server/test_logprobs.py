"""Log-probabilities over HTTP equal the log-softmax of transformers' logits in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fake_engine import MODEL

TOLERANCE = 1e-3
OPTIONS = {
    "model": MODEL,
    "temperature": 0.8,
    "seed": 4,
    "presence_penalty": 1,
    "ignore_eos": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "max_tokens": 12,
}
Entry = tuple[str, float, dict[str, float]]


@pytest.fixture(scope="module")
def logprobs_of(tiny_server: Any) -> Callable[[list[int]], np.ndarray]:
    """Row i: log-probabilities of what follows token i."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_server.folder, dtype=torch.float32).eval()

    def rows(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1).numpy()

    return rows


def check(entries: list[Entry], ids: list[int], rows: np.ndarray, num_top: int) -> None:
    """``entries`` are of the last of ``ids``: token, its value, and the best ones."""
    first = len(ids) - len(entries)
    for position, (token, value, top) in enumerate(entries, start=first):
        row = rows[position - 1]
        assert token == f"token_id:{ids[position]}"
        assert value == pytest.approx(row[ids[position]], abs=TOLERANCE)
        assert len(top) >= num_top
        for name, other in top.items():
            assert other == pytest.approx(row[int(name.removeprefix("token_id:"))], abs=TOLERANCE)
        best = sorted(top.values(), reverse=True)[:num_top]
        np.testing.assert_allclose(best, np.sort(row)[::-1][:num_top], atol=TOLERANCE)


def post(server: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer, or the data of every event but the last."""
    response = httpx.post(f"{server.url}{path}", json={**OPTIONS, **body}, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return [response.json()]
    events = response.text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def completion_entries(choice: dict[str, Any]) -> list[Entry]:
    logprobs = choice["logprobs"]
    names = ("tokens", "token_logprobs", "top_logprobs")
    return list(zip(*(logprobs[name] for name in names), strict=True))


def chat_entries(choice: dict[str, Any]) -> list[Entry]:
    content = (choice["logprobs"] or {"content": []})["content"]
    return [
        (e["token"], e["logprob"], {t["token"]: t["logprob"] for t in e["top_logprobs"]})
        for e in content
    ]


def test_completion_and_its_prompt(tiny_server, logprobs_of):
    prompt = np.random.default_rng(5).integers(0, 256, 150).tolist()
    (answer,) = post(
        tiny_server, "/v1/completions", {"prompt": prompt, "logprobs": 5, "echo": True, "n": 2}
    )
    for choice in answer["choices"]:
        entries = completion_entries(choice)
        assert entries[0] == (f"token_id:{prompt[0]}", None, None)
        ids = prompt + choice["token_ids"]
        assert len(entries) == len(ids) == 162
        check(entries[1:], ids, logprobs_of(ids), 5)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_without_its_prompt(tiny_server, logprobs_of, stream):
    body = {"prompt": "It was a dark and stormy night", "logprobs": 3, "stream": stream}
    choices = [a["choices"][0] for a in post(tiny_server, "/v1/completions", body)]
    entries = [entry for choice in choices for entry in completion_entries(choice)]
    ids = [token for choice in choices for token in choice["token_ids"]]
    assert len(entries) == len(ids) == 12
    ids = choices[0]["prompt_token_ids"] + ids
    check(entries, ids, logprobs_of(ids), 3)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(tiny_server, logprobs_of, stream):
    body = {
        "messages": [{"role": "user", "content": "Who is there?"}],
        "logprobs": True,
        "top_logprobs": 20,
        "stream": stream,
    }
    answers = post(tiny_server, "/v1/chat/completions", body)
    choices = [answer["choices"][0] for answer in answers]
    entries = [entry for choice in choices for entry in chat_entries(choice)]
    ids = [token for choice in choices for token in choice.get("token_ids", ())]
    assert len(entries) == len(ids) == 12
    ids = answers[0]["prompt_token_ids"] + ids
    check(entries, ids, logprobs_of(ids), 20)


def test_prompt_of_a_chat(tiny_server, logprobs_of):
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "prompt_logprobs": 4}
    (answer,) = post(tiny_server, "/v1/chat/completions", body)
    ids = answer["prompt_token_ids"]
    first, *others = answer["prompt_logprobs"]
    assert first is None
    entries = [
        (
            f"token_id:{token}",
            entry[str(token)]["logprob"],
            {f"token_id:{other}": value["logprob"] for other, value in entry.items()},
        )
        for token, entry in zip(ids[1:], others, strict=True)
    ]
    check(entries, ids, logprobs_of(ids), 4)
