"""Prompt-cache fields: namespaces, breakpoints exact to the token, lifetimes."""

from __future__ import annotations

import pytest
from fake_engine import MODEL

from chunkllama_server.transport.auth import Tenants

BREAKPOINT = {"mode": "explicit"}


def engine_request(server, parts, **fields):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "rules"}]},
        {"role": "user", "content": parts},
    ]
    body = {"model": MODEL, "messages": messages, **fields}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200
    return server.engine.requests[-1]


def test_whole_prompt_is_stored_by_default(server):
    request = engine_request(server, "hi")
    assert (request.cache_until, request.pin_seconds) == (None, 0.0)


def test_explicit_without_breakpoint_stores_nothing(server):
    request = engine_request(server, "hi", prompt_cache_options={"mode": "explicit"})
    assert request.cache_until == 0


@pytest.mark.parametrize("num_before", [0, 1, 7, 63, 64, 65])
def test_breakpoint_is_exact_to_the_token(server, text_parts, num_before):
    stable = "é" * num_before
    parts = [
        {"type": "text", "text": f"doc {stable}", "prompt_cache_breakpoint": BREAKPOINT},
        {"type": "text", "text": "question"},
    ]
    request = engine_request(server, parts, prompt_cache_options={"mode": "explicit"})
    stored = text_parts[0].decode(
        request.prompt_token_ids[: request.cache_until], skip_special_tokens=False
    )
    assert stored.endswith(f"user\ndoc {stable}")


def test_last_breakpoint_decides_and_end_of_message_is_exact(server, text_parts):
    parts = [
        {"type": "text", "text": "a", "prompt_cache_breakpoint": BREAKPOINT},
        {"type": "text", "text": "b", "prompt_cache_breakpoint": BREAKPOINT},
    ]
    request = engine_request(server, parts, prompt_cache_options={"mode": "explicit"})
    stored = text_parts[0].decode(
        request.prompt_token_ids[: request.cache_until], skip_special_tokens=False
    )
    assert stored.endswith("user\na\nb")


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"prompt_cache_options": {"ttl": "30m"}}, 1800.0),
        ({"prompt_cache_options": {"ttl": "5s"}}, 5.0),
        ({"prompt_cache_options": {"ttl": "24h"}}, 86400.0),
        ({"prompt_cache_retention": "24h"}, 86400.0),
        ({"prompt_cache_retention": "in_memory"}, 0.0),
    ],
)
def test_lifetimes(server, fields, seconds):
    assert engine_request(server, "hi", **fields).pin_seconds == seconds


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("ttl", "said"), [("30m", "granted"), ("24h", "over-budget"), (None, None)]
)
def test_a_pin_over_budget_is_said(server, ttl, said, stream):
    options = {"prompt_cache_options": {"ttl": ttl}} if ttl else {}
    response = server.chat(stream=stream, **options)
    assert response.headers.get("x-chunkllama-cache-pin") == said


def test_salt_narrows_and_never_shares(server):
    plain = engine_request(server, "hi").namespace
    salted = engine_request(server, "hi", cache_salt="s1").namespace
    again = engine_request(server, "hi", cache_salt="s1").namespace
    other = engine_request(server, "hi", cache_salt="s2").namespace
    assert plain == ""
    assert len({plain, salted, other}) == 3
    assert salted == again


def test_cache_key_never_widens(server):
    keyed = engine_request(server, "hi", prompt_cache_key="k", cache_salt="s").namespace
    assert keyed == engine_request(server, "hi", cache_salt="s").namespace


def tenants(isolation, num_keys: int = 2) -> Tenants:
    return Tenants({f"t{i}": f"k{i}" for i in range(num_keys)}, isolation)


def test_tenants_are_apart_and_lengths_count():
    isolated = tenants("tenant")
    spaces = {
        isolated.namespace(tenant, salt)
        for tenant, salt in (
            ("org_1", "2345"), ("org_12345", None), ("org_12345", "2"), ("", "org_12345"),
        )
    }  # fmt: skip
    assert len(spaces) == 4
    assert all(spaces)


def test_a_salt_cannot_reach_another_tenants_namespace():
    isolated = tenants("tenant")
    victim = isolated.namespace("victim", None)
    for salt in ("victim", victim, "\0victim", "\x00\x00\x00\x00\x00\x00\x00\x06victim"):
        assert isolated.namespace("attacker", salt) != victim


def test_isolation_is_the_default_with_keys():
    assert tenants(None, 2).are_isolated
    assert tenants(None, 1).are_isolated, "a reload may bring a second key"
    assert not tenants(None, 0).are_isolated
    assert not tenants("off", 5).are_isolated
    assert tenants("tenant", 1).are_isolated
    assert tenants("off").namespace("a", None) == ""


def test_secrets_differ_between_processes():
    one, two = tenants("tenant"), tenants("tenant")
    assert one.namespace("a", None) != two.namespace("a", None)


def test_cached_tokens_do_not_cross_tenants(start_server):
    server = start_server(api_keys={"a": "ka", "b": "kb"})

    def cached(key: str) -> int:
        answer = server.client(key).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "shared secret"}]
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached("ka"), cached("kb")] == [0, 0]
    assert cached("ka") > 0
