"""No answer to one key holds a token of another key's prompts: every output is searched."""

from __future__ import annotations

import itertools
import json

import httpx
import pytest

# Characters of two tokens each that nothing else contains; half of one decodes to U+FFFD.
SECRET = "ß¶§¤"
BASE = "you are a helpful assistant of the company and answer briefly " * 4


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("red:key-red\nblue:key-blue\n")
    return start("--api-key-file", keys, "--num-chunks", "24", "--max-model-len", "512")


@pytest.fixture(scope="module")
def shared(start, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("red:key-red\nblue:key-blue\n")
    return start(
        "--api-key-file", keys, "--num-chunks", "24", "--max-model-len", "512",
        "--isolation", "off",
    )  # fmt: skip


class Client:
    """Sends requests with one key."""

    def __init__(self, server, key: str) -> None:
        headers = {"authorization": f"Bearer key-{key}", "x-chunkllama-explain": "1"}
        self.http = httpx.Client(base_url=server.url, headers=headers, timeout=60)
        # the answer of a random model may be any byte; this one is "a"
        letters = self.ask("/tokenize", {"prompt": "a"}).json()["tokens"]
        fields = {"max_tokens": 1, "temperature": 0, "allowed_token_ids": letters}
        self._body = {"model": server.model, **fields}

    def ask(self, path: str, body: dict) -> httpx.Response:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer

    def complete(self, prompt: str) -> httpx.Response:
        return self.ask("/v1/completions", {**self._body, "prompt": prompt})


def outputs(client: Client, prompts: list[str]) -> list[tuple[str, str]]:
    """Everything that the server tells a client, as (reason, text of head and body)."""
    told = []
    for prompt in prompts:
        explained = client.ask("/v1/cache/explain", {"prompt": prompt})
        for answer in (explained, client.complete(prompt)):
            value = answer.json()
            text = json.dumps(value, ensure_ascii=False) + answer.text + str(answer.headers)
            if "usage" in value:
                (value,) = value["usage"]["prompt_tokens_details"]["cache_explanations"]
            told.append((value["reason"], text))
    for path in ("/metrics", "/dashboard/data", "/v1/models"):
        told.append(("", client.http.get(path).text))
    return told


@pytest.mark.parametrize("kind", [pytest.param("server", marks=pytest.mark.nightly), "shared"])
def test_no_output_holds_another_keys_tokens(kind, request) -> None:
    server = request.getfixturevalue(kind)
    red, blue = Client(server, "red"), Client(server, "blue")
    cuts = (1, 30, 63, 64, 65, 127, 128, 140)
    for cut, turn in itertools.product(cuts, range(2)):
        red.complete(BASE[:cut] + SECRET * (3 + turn))
    prompts = [BASE[:cut] + "abc" for cut in cuts] + [BASE, BASE + "more", "other"]
    told = outputs(blue, prompts) + outputs(blue, prompts[::-1])
    for reason, text in told:
        assert not {*SECRET, "\ufffd"} & {*text}, (reason, text)
        assert reason not in ("in_progress",)
    reasons = {reason for reason, _ in told}
    assert {"complete", "diverged"} <= reasons
    if kind == "server":
        first = told[0]
        assert first[0] == "never_seen"
