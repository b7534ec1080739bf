"""Requests made up from our OpenAPI document: never a 5xx, an undocumented status or a slow
refusal."""

from __future__ import annotations

import itertools
import time
from typing import Any

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
    "POST /v1/chat/completions": 250,
    "POST /v1/completions": 200,
    "POST /v1/responses": 200,
    "POST /v1/chat/completions/render": 60,
    "POST /v1/responses/input_tokens": 50,
    "POST /v1/embeddings": 80,
    "POST /tokenize": 60,
    "POST /detokenize": 40,
    "GET /v1/responses/{response_id}": 15,
    "DELETE /v1/responses/{response_id}": 15,
    "GET /v1/models/{model}": 15,
    "GET /v1/models": 3,
    "GET /version": 3,
    "GET /metrics": 3,
    "GET /health": 2,
    "GET /health/ready": 2,
    "GET /health/live": 2,
}
NIGHTLY_FACTOR = 5
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def fuzzed(start_server: Any) -> Any:
    server = start_server()
    server.engine.tokens_per_delta = 512
    return server


@pytest.fixture(scope="module")
def operations(fuzzed: Any) -> dict[str, Any]:
    document = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
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


def plausible(body: dict[str, Any]) -> dict[str, Any]:
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
    for name in ("audio", "moderation", "web_search_options", "documents", "kv_transfer_params",
                 "vllm_xargs", "conversation", "context_management", "chat_template"):  # fmt: skip
        body.pop(name, None)
    return body


def fuzz(server: Any, operation: Any, num_cases: int, *, fresh: bool = False) -> None:
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
        server.engine.requests.clear()
        server.engine.prompts.clear()
        server.engine.aborted.clear()
        if isinstance(case.body, dict):
            case.body = plausible(case.body) if next(numbers) % 4 else with_model(case.body)
        started = time.monotonic()
        response = case.call_and_validate(checks=CHECKS)
        if response.status_code >= 400:
            assert time.monotonic() - started < 1.0

    one_case()


def test_every_operation_is_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_made_up_requests(fuzzed: Any, operations: dict[str, Any], label: str) -> None:
    fuzz(fuzzed, operations[label], OPERATIONS[label])


@pytest.mark.nightly
@pytest.mark.parametrize("label", OPERATIONS)
def test_many_made_up_requests(fuzzed: Any, operations: dict[str, Any], label: str) -> None:
    fuzz(fuzzed, operations[label], OPERATIONS[label] * NIGHTLY_FACTOR, fresh=True)
