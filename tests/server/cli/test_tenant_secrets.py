"""What one tenant sends is in no output that another tenant can cause, nor in the log."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

WORDS = ("zaffre", "quokka", "xylem")  # the tiny model's tokens are bytes
SECRET = " ".join(f"{word}-{word[::-1]}" for word in WORDS)
SHARED = "you are a helpful assistant of the company and answer each question. " * 2
REST = " please keep to the point and name the page of the handbook you have used"


@pytest.fixture(scope="module")
def served(start, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("crimson:key-crimson requests_per_minute=10000\ncobalt:key-cobalt\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start(
        *("--api-key-file", keys, "--admin-port", port, "--log-level", "debug"),
        *("--operator-key", "key-operator"),
    )
    server.admin = f"http://127.0.0.1:{port}"
    return server


class Client:
    """Sends requests with one key and keeps everything that comes back."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.seen: list[str] = []
        headers = {"authorization": f"Bearer key-{key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def send(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        answer = self._http.request(method, path, json=body, headers=headers)
        assert answer.status_code < 500, answer.text
        self.seen.append("\n".join(f"{k}: {v}" for k, v in answer.headers.items()) + answer.text)
        return answer

    def prompts(self, text: str) -> str:
        """Send a text through every endpoint that takes one; returns a stored response's id."""
        explain = {"x-chunkllama-explain": "1"}
        messages = [{"role": "system", "content": SHARED}, {"role": "user", "content": text}]
        few = {"max_tokens": 2}
        for stream in (False, True):
            self.send(
                "POST", "/v1/completions",
                {"prompt": SHARED + text, "stream": stream, "logprobs": 2, **few}, **explain,
            )  # fmt: skip
            self.send(
                "POST", "/v1/chat/completions",
                {"messages": messages, "stream": stream, "logprobs": True, **few}, **explain,
            )  # fmt: skip
            self.send(
                "POST", "/v1/responses",
                {"input": text, "instructions": SHARED, "stream": stream, "max_output_tokens": 16},
                **explain,
            )  # fmt: skip
            for path, asked in (
                ("/v1/messages", {"messages": messages[1:], "system": SHARED, **few}),
                ("/api/chat", {"messages": messages, "options": {"num_predict": 2}}),
                ("/api/generate", {"prompt": SHARED + text, "options": {"num_predict": 2}}),
            ):
                body = {"model": "tiny", "stream": stream, **asked}
                assert self.send("POST", path, body, **explain).status_code == 200
        body = {"inputs": SHARED + text, "parameters": {"max_new_tokens": 2, "details": True}}
        self.send("POST", "/generate", body)
        for second in range(4):  # a difference that the report finds
            moment = f"at 10:00:0{second} {text} " + REST
            self.send("POST", "/v1/completions", {"prompt": SHARED + moment, **few}, **explain)
        pin = {"prompt_cache_options": {"ttl": "5m"}}
        self.send("POST", "/v1/completions", {"prompt": text, **few, **pin})
        for path in ("/v1/embeddings", "/tokenize", "/v1/cache/explain"):
            field = "input" if path == "/v1/embeddings" else "prompt"
            self.send("POST", path, {field: SHARED + text})
        for wrong in (
            {"prompt": SHARED + text, "temperature": text},
            {"prompt": SHARED + text, "model": text},
            {"prompt": SHARED + text, "stop": [text] * 50},
            {"prompt": SHARED + text, text: 1},
            {"prompt": (SHARED + text) * 40},
            {"prompt": [SHARED + text, text], "echo": text},
        ):
            self.send("POST", "/v1/completions", {**few, **wrong})
        body = {"input": text, "store": True, "max_output_tokens": 16}
        answer = self.send("POST", "/v1/responses", body)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def runs_a_batch(self, text: str) -> tuple[str, str]:
        """Run a text as a batch's only line; returns the ids of the batch and of its file."""
        body = {"model": "tiny", "prompt": SHARED + text, "max_tokens": 2}
        line = {"custom_id": text, "method": "POST", "url": "/v1/completions", "body": body}
        answer = self._http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": (text, json.dumps(line))}
        )
        file_id = answer.json()["id"]
        job = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = self.send("POST", "/v1/batches", job).json()
        for _ in range(3000):
            if batch["status"] == "completed":
                break
            assert batch["status"] in ("validating", "in_progress", "finalizing"), batch
            time.sleep(0.02)
            batch = self.send("GET", f"/v1/batches/{batch['id']}").json()
        assert batch["status"] == "completed", batch
        assert batch["request_counts"]["completed"] == 1, batch
        return batch["id"], file_id

    def reads(self, response_id: str, batch_id: str, file_id: str) -> None:
        """Read everything that has no prompt."""
        for path in (
            *("/metrics", "/v1/usage", "/v1/models", "/dashboard", "/dashboard/data"),
            *("/dashboard/tenants", "/dashboard/divergence", "/health", "/openapi.json"),
            *("/dashboard/requests", "/dashboard/history", "/v1/loads", "/server_info"),
            *(f"/v1/responses/{response_id}", f"/v1/responses/{response_id}/input_items"),
            *("/v1/files", f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"),
            *("/v1/batches", f"/v1/batches/{batch_id}", "/v1/fine_tuning/jobs", "/api/ps"),
        ):
            self.send("GET", path)
        self.send("POST", f"/v1/responses/{response_id}/cancel", {})
        body = {"input": "go on", "previous_response_id": response_id, "max_output_tokens": 16}
        self.send("POST", "/v1/responses", body)


def numbers(text: str) -> Iterator[list[int]]:
    """Every list of integers in the JSON of an answer or of its events."""
    for line in [text.partition("{")[1] + text.partition("{")[2], *text.splitlines()]:
        try:
            pending = [json.loads(line.removeprefix("data: "))]
        except ValueError:
            continue
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, list):
                pending += value
                yield [each for each in value if isinstance(each, int)]


def check_absent(texts: list[str], token_ids: list[int]) -> None:
    runs = {tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)}
    for text in texts:
        for word in WORDS:
            assert word not in text and word[::-1] not in text, text[:2000]
        for ids in numbers(text):
            assert not runs & {tuple(ids[i : i + 4]) for i in range(len(ids) - 3)}, text[:2000]


def test_no_output_holds_what_another_tenant_sent(served) -> None:
    cobalt, crimson = Client(served.url, "cobalt"), Client(served.url, "crimson")
    admin, operator = Client(served.admin), Client(served.url, "operator")
    token_ids = cobalt.send("POST", "/tokenize", {"prompt": SECRET}).json()["tokens"]
    assert len(token_ids) >= len(SECRET)
    response_id = cobalt.prompts(SECRET)
    ids = response_id, *cobalt.runs_a_batch(SECRET)
    cobalt.reads(*ids)
    with pytest.raises(AssertionError):  # the search finds it where it may be
        check_absent(cobalt.seen, token_ids)
    assert cobalt.send("GET", "/dashboard/divergence").json()["data"], "its prompts have a row"

    crimson.prompts("what is on page seven")
    for length in (1, 2, 3):  # guesses that share more and more with the other's prompt
        for path in ("/v1/cache/explain", "/v1/completions"):
            body = {"prompt": f"{SHARED}{SECRET[:length]}?", "max_tokens": 1}
            crimson.send("POST", path, body, **{"x-chunkllama-explain": "1"})
    crimson.reads(*ids)
    check_absent(crimson.seen, token_ids)
    assert all("cobalt" not in text for text in crimson.seen)

    for path in ("pins", "tree", "tree?tenant=cobalt"):
        assert "cobalt" in admin.send("GET", f"/admin/cache/{path}").text
    with httpx.stream("GET", f"{served.admin}/admin/cache/events", timeout=60) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(40)]
    assert any('"tenant":"cobalt"' in line for line in seen)
    for path in ("/metrics", "/v1/usage", "/health"):
        admin.send("GET", path)
    for path in ("/metrics", "/v1/usage", "/dashboard/data", "/dashboard/tenants"):
        operator.send("GET", path)
    check_absent([*admin.seen, *operator.seen, "\n".join(seen)], token_ids)
    check_absent(served.log.read_text().splitlines(), token_ids)
