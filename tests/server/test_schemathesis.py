"""Requests made up from our OpenAPI document, sent to a real server over a tiny random model with
a 256-token context: never a 5xx, an undocumented status or a slow refusal, and nothing left
over."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from fake_engine import MODEL
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.numpy import save_file
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
MAX_REFUSAL_SECONDS = 1.0
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


MAX_MODEL_LEN = 256


def write_tiny_model(folder: Path, write_tokenizer: Callable[[Path], None]) -> None:
    """A random Llama of two layers over a byte-level tokenizer, written without torch."""
    write_tokenizer(folder)
    vocab, hidden, heads, kv_heads, head_dim, inner = 259, 128, 2, 1, 64, 128
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{block}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{block}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{block}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{block}.mlp.gate_proj": (inner, hidden),
            f"{block}.mlp.up_proj": (inner, hidden),
            f"{block}.mlp.down_proj": (hidden, inner),
            f"{block}.input_layernorm": (hidden,),
            f"{block}.post_attention_layernorm": (hidden,),
        }
    shapes["model.norm"] = (hidden,)
    random = np.random.default_rng(7)
    weights = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tokenizer_writer: Any) -> Iterator[str]:
    """A real server process over the tiny model; it must outlive all requests."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, tokenizer_writer)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "server.cli", "serve", "--model", str(folder)),
        *("--served-model-name", MODEL, "--port", str(port)),
        *("--num-chunks", "64", "--max-model-len", str(MAX_MODEL_LEN), "--threads", "1"),
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_ready(url, process, folder / "log")
        yield url
        assert process.poll() is None, "the server died"
        check_idle(url)
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


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
    # A random model hardly ever ends by itself.
    body.setdefault("max_tokens", 8)
    for name in ("audio", "moderation", "web_search_options", "documents", "kv_transfer_params",
                 "vllm_xargs", "conversation", "context_management", "chat_template"):  # fmt: skip
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
            case.body = plausible(case.body) if next(numbers) % 4 else with_model(case.body)
        response = case.call_and_validate(checks=CHECKS)
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
