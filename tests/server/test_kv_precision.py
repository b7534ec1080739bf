"""A server whose K/V are stored in int8 says so in usage, the fingerprint and the metrics."""

from __future__ import annotations

import pytest

from chunkllama_server.api.schema.usage import Precision, TokenCounts


@pytest.fixture
def quantized(start_server):
    server = start_server(metrics_compat="vllm")
    server.engine.info.kv_dtype, server.engine.info.is_kv_quantized = "int8", True
    server.app.state.context.metrics.describe("tiny", server.engine.info, "0")
    return server


def test_usage_names_the_precision_of_cached_tokens(quantized) -> None:
    body = quantized.chat().json()
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    named = body["usage"]["prompt_tokens_details"]["cached_tokens_by_precision"]
    assert named == {"int8": cached}
    assert body["system_fingerprint"].endswith("-kv_int8")
    usage = quantized.post("/v1/completions", {"prompt": ["x", "y"]}).json()["usage"]
    assert set(usage["prompt_tokens_details"]["cached_tokens_by_precision"]) == {"int8"}
    usage = quantized.post("/v1/responses", {"input": "x"}).json()["usage"]
    details = usage["input_tokens_details"]
    assert details["cached_tokens_by_precision"] == {"int8": details["cached_tokens"]}


def test_usage_tells_tokens_that_the_tier_has_rounded(start_server) -> None:
    server = start_server()
    server.engine.info.kv_dtype, server.engine.info.tier_bits = "bfloat16", 2
    details = server.chat().json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens_by_precision"] == {
        "bfloat16": details["cached_tokens"],
        "int2": 0,
    }
    counts = TokenCounts(prompt=900, cached=700, written=0, output=1, reasoning=0, rounded=640)
    assert Precision("bfloat16", "int2").split(counts) == {"bfloat16": 60, "int2": 640}


def test_metrics_name_the_storage(quantized) -> None:
    with quantized.http() as http:
        text = http.get("/metrics").text
    assert 'kv_dtype="int8"' in text
    assert 'cache_dtype="int8"' in text


def test_the_models_own_type_changes_nothing(server) -> None:
    body = server.chat().json()
    assert "cached_tokens_by_precision" not in body["usage"]["prompt_tokens_details"]
    assert "kv_" not in body["system_fingerprint"]
