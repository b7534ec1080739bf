"""Requests made up from our OpenAPI document, sent to a real server over a tiny random model with
a 256-token context: never a 5xx, an undocumented status or a slow refusal, and nothing left
over."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fake_engine import MODEL
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# Operation -> cases in CI; the nightly size is five times that.
OPERATIONS = {
    "POST /v1/chat/completions": 120,
    "POST /v1/completions": 100,
    "POST /v1/responses": 100,
    "POST /v1/messages": 40,
    "POST /v1/messages/count_tokens": 10,
    "POST /api/chat": 15,
    "POST /api/generate": 15,
    "POST /api/embed": 10,
    "POST /api/embeddings": 5,
    "POST /api/show": 5,
    "GET /api/tags": 2,
    "GET /api/ps": 2,
    "GET /api/version": 2,
    "POST /generate": 15,
    "POST /generate_stream": 10,
    "POST /": 10,
    "POST /embed": 10,
    "GET /info": 2,
    "POST /rerank": 2,
    "POST /v1/rerank": 2,
    "POST /v2/rerank": 2,
    "POST /score": 2,
    "POST /v1/score": 2,
    "POST /v1/files": 5,
    "GET /v1/files": 5,
    "GET /v1/files/{file_id}": 3,
    "GET /v1/files/{file_id}/content": 3,
    "DELETE /v1/files/{file_id}": 3,
    "POST /v1/batches": 5,
    "GET /v1/batches": 5,
    "GET /v1/batches/{batch_id}": 3,
    "POST /v1/batches/{batch_id}/cancel": 3,
    "POST /v1/fine_tuning/jobs": 5,
    "GET /v1/fine_tuning/jobs": 3,
    "GET /v1/fine_tuning/jobs/{job_id}": 3,
    "GET /v1/fine_tuning/jobs/{job_id}/events": 3,
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": 3,
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": 3,
    "POST /v1/fine_tuning/jobs/{job_id}/pause": 3,
    "POST /v1/fine_tuning/jobs/{job_id}/resume": 3,
    "DELETE /v1/models/{model}": 3,
    "POST /v1/chat/completions/render": 60,
    "POST /v1/completions/render": 30,
    "POST /v1/responses/input_tokens": 50,
    "POST /v1/embeddings": 80,
    "POST /tokenize": 60,
    "POST /detokenize": 40,
    "GET /v1/responses/{response_id}": 15,
    "DELETE /v1/responses/{response_id}": 15,
    "GET /v1/responses/{response_id}/input_items": 15,
    "POST /v1/responses/{response_id}/cancel": 15,
    "POST /v1/responses/compact": 30,
    "POST /v1/cache/explain": 30,
    "GET /v1/usage": 3,
    "GET /dashboard/tenants": 3,
    "GET /dashboard/divergence": 3,
    "GET /dashboard/requests": 3,
    "DELETE /dashboard/requests/{request_id}": 15,
    "POST /v1/load_lora_adapter": 15,
    "POST /v1/unload_lora_adapter": 15,
    "GET /v1/models/{model}": 15,
    "GET /v1/models": 3,
    "GET /version": 3,
    "GET /server_info": 2,
    "GET /model_info": 2,
    "GET /v1/loads": 2,
    "GET /metrics": 3,
    "GET /health": 2,
    "GET /health/ready": 2,
    "GET /health/live": 2,
}
NIGHTLY_FACTOR = 5
MAX_REFUSAL_SECONDS = 1.0
REFUSED = (
    "audio", "moderation", "web_search_options", "documents", "kv_transfer_params", "vllm_xargs",
    "conversation", "context_management", "chat_template", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "regex", "ebnf", "prompt_token_ids", "input_ids",
)  # fmt: skip
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def url(tiny_server: Any) -> Iterator[str]:
    """A real server process over the tiny model; it must outlive all requests."""
    yield tiny_server.url
    assert tiny_server.process.poll() is None, "the server died"
    check_idle(tiny_server.url)


def check_idle(url: str) -> None:
    """Nothing is left over: no live request, no referenced chunk, no broken invariant."""
    wanted = (
        "chunkllama_requests_live 0.0",
        'chunkllama_kv_chunks{state="referenced"} 0.0',
        'chunkllama_kv_chunks{state="private"} 0.0',
        "chunkllama_invariant_violations 0.0",
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        metrics = httpx.get(f"{url}/metrics").text
        if all(line in metrics for line in wanted):
            return
        time.sleep(0.1)
    raise AssertionError(metrics)


@pytest.fixture(scope="module")
def operations(url: str) -> dict[str, Any]:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in document.get_all_operations()]
    return {operation.label: operation for operation in found}


def with_model(body: dict[str, Any]) -> dict[str, Any]:
    """Any other model name is a 404 before anything else is looked at."""
    return {**body, "model": MODEL} if isinstance(body.get("model"), str) else body


def without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, list):
        return [without_nul(item) for item in value]
    if isinstance(value, dict):
        return {without_nul(key): without_nul(item) for key, item in value.items()}
    return value


def plausible(body: dict[str, Any], is_response: bool) -> dict[str, Any]:
    """The same request without what is refused first and would hide all that comes after."""
    body = without_nul(with_model(body))
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    if body.get("logprobs") is not True and "messages" in body:
        body.pop("top_logprobs", None)
    messages = body.get("messages") or body.get("input")
    if isinstance(messages, list):
        for message in messages:
            if isinstance(message, dict):
                if not isinstance(message.get("content"), str):
                    message["content"] = "say(made up)yas"
                message.setdefault("tool_call_id", "call")
                message.setdefault("role", "user")
    # A random model hardly ever ends by itself.
    body.setdefault(*(("max_output_tokens", 16) if is_response else ("max_tokens", 8)))
    for name in REFUSED:
        body.pop(name, None)
    return body


def fuzz(operation: Any, num_cases: int, *, fresh: bool = False) -> None:
    numbers = itertools.count()

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=not fresh,
        database=None,
        # A failure says how to repeat it; shrinking it would take longer than all cases.
        print_blob=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one_case(case: Any) -> None:
        if isinstance(case.body, dict):
            changed = plausible(case.body, "/responses" in operation.path)
            case.body = changed if next(numbers) % 4 else with_model(case.body)
        response = case.call_and_validate(checks=CHECKS, timeout=120)
        if response.status_code >= 400 and response.elapsed > MAX_REFUSAL_SECONDS:
            # A busy machine may stall once; a slow refusal is slow every time.
            assert min(case.call().elapsed for _ in range(3)) < MAX_REFUSAL_SECONDS

    one_case()


def test_every_operation_is_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_made_up_requests(operations: dict[str, Any], label: str) -> None:
    fuzz(operations[label], OPERATIONS[label])


@pytest.mark.nightly
@pytest.mark.parametrize("label", OPERATIONS)
def test_many_made_up_requests(operations: dict[str, Any], label: str) -> None:
    fuzz(operations[label], OPERATIONS[label] * NIGHTLY_FACTOR, fresh=True)
