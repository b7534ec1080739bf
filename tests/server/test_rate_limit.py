"""Requests and tokens per minute, by a clock that the tests turn."""

from __future__ import annotations

import asyncio
import random
import re

import anyio
import openai
import pytest
from fake_engine import MODEL

from chunkllama.errors import EngineDeadError, OverloadedError, RequestFailedError
from chunkllama_server.config.tenants import TenantQuotas
from chunkllama_server.transport.auth import Tenants
from chunkllama_server.transport.errors import ApiError
from chunkllama_server.transport.rate_limit import RateLimiter, TokenBucket, TokenCharge, duration

NOW = [1000.0]
PROMPT = [7] * 20


def clock() -> float:
    return NOW[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"), (0.0301, "31ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"),
        (59.9999, "1m0s"), (72.5, "1m12.5s"), (360, "6m0s"), (1e-9, "0ms"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_bucket_refills_continuously() -> None:
    NOW[0] = 0.0
    bucket = TokenBucket(60, clock)
    bucket.take(60)
    assert bucket.remaining == 0 and bucket.seconds_until(1) == pytest.approx(1.0)
    assert bucket.seconds_until_full() == pytest.approx(60.0)
    NOW[0] = 0.5
    assert bucket.remaining == 0 and bucket.seconds_until(1) == pytest.approx(0.5)
    NOW[0] = 10.0
    assert bucket.remaining == 10
    bucket.take(40)
    assert bucket.remaining == 0 and bucket.seconds_until(1) == pytest.approx(31.0)
    NOW[0] = 1e6
    assert bucket.remaining == 60


def test_servers_that_tell_each_other_what_was_spent_keep_one_rate() -> None:
    """Three servers get requests as fast as they take them, and exchange once a second."""
    NOW[0] = 0.0
    quotas = {"t": TenantQuotas(requests_per_minute=60, tokens_per_minute=6000)}
    servers = [Tenants({"t": "key"}, clock=clock) for _ in range(3)]
    for server in servers:
        server.set_quotas(quotas)
    accepted = []
    for second in range(600):
        NOW[0] = float(second)
        before = len(accepted)
        for server in servers:
            limiter = server.limiter("t")
            for _ in range(200):
                try:
                    limiter.take_request()
                    limiter.take_tokens(10).use(30)  # 20 more than was known before
                except ApiError:
                    break
                accepted.append(second)
        spent = [server.take_spent() for server in servers]
        if len(accepted) == before:
            assert spent == [{}, {}, {}]
        for server in servers:
            for other, told in zip(servers, spent, strict=True):
                if other is not server:
                    server.charge_elsewhere({**told, "unknown": (1.0, 1.0)})
    # each server's bucket is full at first; one token bucket of all would let 60 + 599 pass
    assert 3 * 60 <= accepted.count(0) + accepted.count(1) <= 3 * 60 + 3
    assert len(accepted) <= 60 + 599 + 3, "what was too much at first is made up for"
    assert len(accepted) >= 600


def test_a_new_limit_keeps_the_part_that_is_left() -> None:
    NOW[0] = 0.0
    limiter = RateLimiter(TenantQuotas(tokens_per_minute=100), clock)
    limiter.take_tokens(75)
    limiter.set_quotas(TenantQuotas(tokens_per_minute=1000, requests_per_minute=5))
    assert limiter.tokens is not None and limiter.tokens.remaining == 250
    assert limiter.requests is not None and limiter.requests.remaining == 5
    limiter.set_quotas(TenantQuotas())
    assert limiter.headers() == {}


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_has_more_than_twice_the_limit_and_settled_use_is_what_was_taken(
    seed: int,
) -> None:
    """A full bucket and a minute's refill; estimates that are too high or too low cancel out."""
    rng = random.Random(seed)
    NOW[0] = 0.0
    limiter = RateLimiter(TenantQuotas(tokens_per_minute=600), clock)
    live: list[tuple[TokenCharge, int]] = []
    taken: list[tuple[float, int]] = []
    for _ in range(2000):
        NOW[0] += rng.choice([0.0, 0.1, 1.0])
        if rng.random() < 0.7:
            estimate = rng.randrange(1, 200)
            try:
                charge = limiter.take_tokens(estimate)
            except ApiError:
                continue
            live.append((charge, rng.randrange(0, estimate + 1)))
        elif live:
            charge, used = live.pop(rng.randrange(len(live)))
            charge.use(used)
            charge.settle()
            taken.append((NOW[0], used))
            window = [tokens for at, tokens in taken if at > NOW[0] - 60]
            assert sum(window) <= 2 * 600 + 200


def test_output_beyond_the_estimate_is_charged_as_it_comes() -> None:
    NOW[0] = 0.0
    limiter = RateLimiter(TenantQuotas(tokens_per_minute=600), clock)
    charge = limiter.take_tokens(100)
    charge.use(100)
    assert limiter.tokens is not None and limiter.tokens.remaining == 500
    charge.use(700)
    assert limiter.tokens.remaining == 0
    with pytest.raises(ApiError) as caught:
        limiter.take_tokens(100)
    assert caught.value.headers == {"Retry-After": "30", "retry-after-ms": "30000"}
    charge.settle()
    NOW[0] = 30.0
    limiter.take_tokens(100)


QUOTAS = {
    "slow": TenantQuotas(requests_per_minute=3, tokens_per_minute=100),
    "free": TenantQuotas(),
    "tokens": TenantQuotas(tokens_per_minute=100),
}


@pytest.fixture(scope="module")
def limited(start_server):
    keys = {"slow": "ks", "free": "kf", "tokens": "kt"}
    return start_server(api_keys=keys, quotas=QUOTAS, clock=clock)


@pytest.fixture
def fresh(limited):
    """The server after an hour without requests, its engine and quotas as new."""
    NOW[0] += 3600.0
    limited.engine.reset()
    limited.quotas = dict(QUOTAS)
    limited.app.state.context.tenants.set_quotas(limited.quotas)
    return limited


def complete(server, key: str, max_tokens: int | None = 5, **fields: object):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": max_tokens, **fields}
    return server.post("/v1/completions", body, **{"x-api-key": key})


def rate_headers(response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {k.removeprefix(prefix): v for k, v in response.headers.items() if k.startswith(prefix)}


def test_headers_of_a_response(fresh) -> None:
    """ "Paris" and the end of text are 6 tokens; 5 are asked for, so all of the charge is used."""
    assert rate_headers(complete(fresh, "ks")) == {
        "limit-requests": "3", "remaining-requests": "2", "reset-requests": "20s",
        "limit-tokens": "100", "remaining-tokens": "75", "reset-tokens": "15s",
    }  # fmt: skip
    with fresh.http() as http:
        models = http.get("/v1/models", headers={"x-api-key": "ks"})
        missing = http.get("/v1/nothing", headers={"x-api-key": "ks"})
        stranger = http.get("/v1/models", headers={"x-api-key": "?"})
    assert rate_headers(models) == rate_headers(missing) == rate_headers(complete_error(fresh))
    assert rate_headers(stranger) == {}
    assert rate_headers(complete(fresh, "kf")) == {}
    assert set(rate_headers(complete(fresh, "kt"))) == {
        "limit-tokens", "remaining-tokens", "reset-tokens",
    }  # fmt: skip


def test_every_response_has_the_headers(fresh) -> None:
    """Also refusals of each kind, streams, and failures of the engine."""
    fresh.quotas["slow"] = TenantQuotas(requests_per_minute=1000, tokens_per_minute=100_000)
    fresh.app.state.context.tenants.set_quotas(fresh.quotas)
    path, body = "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 5}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    key = {"x-api-key": "ks"}
    answers: list[tuple[int, object]] = []
    with fresh.http(headers=key) as http:

        def send(status: int, method: str, path: str, **content: object) -> None:
            answers.append((status, http.request(method, path, **content)))

        send(200, "POST", path, json=body)
        send(200, "POST", path, json={**body, "stream": True})
        send(200, "POST", "/v1/chat/completions", json={**chat, "stream": True})
        send(200, "POST", "/v1/responses", json={"model": MODEL, "input": "a"})
        send(200, "POST", "/v1/embeddings", json={"model": MODEL, "input": "a"})
        send(200, "POST", "/v1/messages", json={**chat, "max_tokens": 5})
        send(200, "POST", "/v1/messages", json={**chat, "max_tokens": 5, "stream": True})
        send(200, "POST", "/v1/messages/count_tokens", json=chat)
        send(400, "POST", "/v1/messages", json=chat)
        send(200, "POST", "/api/chat", json=chat)
        send(200, "POST", "/api/generate", json={"model": MODEL, "prompt": "a", "stream": False})
        send(200, "POST", "/api/embed", json={"model": MODEL, "input": "a"})
        send(404, "POST", "/api/chat", json={**chat, "model": "none"})
        send(200, "POST", "/generate", json={"inputs": "say(a)yas"})
        send(200, "POST", "/generate_stream", json={"inputs": "say(a)yas"})
        send(422, "POST", "/generate", json={})
        send(200, "POST", "/tokenize", json={"model": MODEL, "prompt": "a"})
        send(200, "POST", "/v1/cache/explain", json={"model": MODEL, "prompt": "a b"})
        for readable in ("/v1/models", "/v1/usage", "/metrics", "/openapi.json"):
            send(200, "GET", readable)
        send(400, "POST", path, json=[])
        send(400, "POST", path, content=b"{", headers={"content-type": "application/json"})
        send(400, "POST", path, json={**body, "temperature": 99})
        send(404, "POST", path, json={**body, "model": "none"})
        send(404, "GET", "/v1/responses/resp_none")
        send(404, "POST", "/v1/none", json={})
        send(405, "GET", path)
        send(405, "DELETE", "/v1/models")
        send(413, "POST", path, content=b"x" * (3 << 20))
        send(415, "POST", path, content=b"x", headers={"content-encoding": "gzip"})
        fresh.engine.fail_with = OverloadedError("full", 1)
        send(429, "POST", path, json=body)
        fresh.engine.fail_with = RequestFailedError("broken", "engine_error")
        send(500, "POST", path, json=body)
        fresh.engine.fail_with = EngineDeadError("gone")
        send(503, "POST", path, json=body)
        fresh.engine.fail_with = ZeroDivisionError()
        send(500, "POST", path, json=body)
        fresh.engine.reset()
        fresh.quotas["slow"] = TenantQuotas(requests_per_minute=3, tokens_per_minute=100)
        fresh.app.state.context.tenants.set_quotas(fresh.quotas)
        send(429, "POST", path, json={**body, "max_tokens": 90})
        for _ in range(2):
            http.post(path, json=[])
        send(429, "POST", path, json=body)
    assert [status for status, _ in answers] == [answer.status_code for _, answer in answers]
    kinds = ("requests", "tokens")
    expected = {f"{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in kinds}
    assert all(set(rate_headers(answer)) == expected for _, answer in answers)


def test_every_route_has_the_headers(fresh) -> None:
    """An empty body is refused by most of them."""
    fresh.quotas["slow"] = TenantQuotas(requests_per_minute=1000, tokens_per_minute=100_000)
    fresh.app.state.context.tenants.set_quotas(fresh.quotas)
    without, seen = set(), 0
    with fresh.http(headers={"x-api-key": "ks"}) as http:
        for path, methods in http.get("/openapi.json").json()["paths"].items():
            for method in methods:
                url = re.sub(r"{\w+}", "none", path)
                answer = http.request(method, url, json={} if method == "post" else None)
                seen += 1
                if len(rate_headers(answer)) != 6:
                    without.add(path)
    assert seen > 60
    assert without == {"/health", "/health/live", "/health/ready"}, "which ask for no key"


def complete_error(server):
    """A path that takes no POST is refused after the request was counted, so by GET."""
    with server.http() as http:
        return http.get("/v1/completions", headers={"x-api-key": "ks"})


def test_requests_beyond_the_limit(fresh) -> None:
    for _ in range(3):
        assert complete(fresh, "ks", 1, prompt=[7]).status_code == 200
    refused = complete(fresh, "ks", 1, prompt=[7])
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "20"
    assert refused.headers["retry-after-ms"] == "20000"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "Limit 3, Used 3, Requested 1. Please try again in 20s" in error["message"]
    assert rate_headers(refused)["remaining-requests"] == "0"
    assert len(fresh.engine.requests) == 3
    assert complete(fresh, "kf").status_code == 200, "another tenant is not concerned"
    NOW[0] += 19.0
    assert complete(fresh, "ks", 1, prompt=[7]).status_code == 429
    NOW[0] += 1.0
    assert complete(fresh, "ks", 1, prompt=[7]).status_code == 200


def test_invalid_requests_count_and_gets_do_not(fresh) -> None:
    with fresh.http() as http:
        for _ in range(9):
            assert http.get("/v1/models", headers={"x-api-key": "ks"}).status_code == 200
    for _ in range(3):
        assert fresh.post("/v1/completions", [], **{"x-api-key": "ks"}).status_code == 400
    assert fresh.post("/v1/completions", [], **{"x-api-key": "ks"}).status_code == 429


def test_tokens_are_charged_up_front_and_settled_after(fresh) -> None:
    complete(fresh, "kt", 75, prompt=[7] * 20)
    # 95 were charged, 20 + 6 used
    assert rate_headers(complete(fresh, "kt", 0, prompt=[7], echo=True))["remaining-tokens"] == "73"
    refused = complete(fresh, "kt", 60)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    assert refused.headers["retry-after"] == "5"  # 7 of 100 a minute are missing: 4.2 s
    assert refused.headers["retry-after-ms"] == "4200"
    NOW[0] += 4.2
    assert complete(fresh, "kt", 60).status_code == 200


def test_a_request_that_can_never_pass_is_not_to_be_sent_again(fresh) -> None:
    refused = complete(fresh, "kt", 81)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"].startswith("Request too large on tokens per min")
    assert refused.headers["x-should-retry"] == "false" and "retry-after" not in refused.headers
    assert complete(fresh, "kt", 80).status_code == 200


@pytest.mark.parametrize(
    ("fields", "charged"),
    [
        ({"max_tokens": 10}, 30),
        ({"max_tokens": 10, "n": 2}, 40),
        ({"max_tokens": 10, "best_of": 3}, 50),
        ({"max_tokens": 10, "prompt": [[7] * 3, [7] * 4]}, 27),
        ({"max_tokens": 0, "echo": True}, 20),
    ],
)
def test_the_estimate_is_prompt_and_max_tokens_of_each_choice(fresh, fields, charged) -> None:
    """Seen while the request runs: a second one, sent meanwhile, has what is left."""
    fresh.engine.fail_with = OverloadedError("full", 1)
    seen = []
    bucket = fresh.app.state.context.tenants.limiter("tokens").tokens
    take = bucket.take
    bucket.take = lambda amount: (seen.append(amount), take(amount))
    try:
        assert complete(fresh, "kt", **fields).status_code == 429
    finally:
        del bucket.take
    assert seen == [charged, -charged], "what the engine refuses is given back"


def test_chat_embeddings_and_responses_are_charged(fresh) -> None:
    left = [100]

    def spent(path: str, body: dict[str, object]) -> int:
        response = fresh.post(path, {"model": MODEL, **body}, **{"x-api-key": "kt"})
        assert response.status_code == 200
        before, left[0] = left[0], int(rate_headers(complete_get(fresh))["remaining-tokens"])
        usage = response.json()["usage"]
        assert before - left[0] == usage["total_tokens"]
        return before - left[0]

    assert spent("/v1/embeddings", {"input": [7, 8, 9]}) == 3
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert 10 < spent("/v1/chat/completions", chat) < 60
    assert 10 < spent("/v1/responses", {"input": "a"}) < 60


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_response_is_settled_when_it_has_run(fresh, stream) -> None:
    def left() -> int:
        return int(rate_headers(complete_get(fresh))["remaining-tokens"])

    fresh.engine.delay = 0.05
    body = {"model": MODEL, "input": f"say({'x' * 200})yas", "background": True}
    body |= {"max_output_tokens": 500, "stream": stream}
    tokens = fresh.app.state.context.tenants.limiter("tokens").tokens
    fresh.quotas["tokens"] = TenantQuotas(tokens_per_minute=1000)
    fresh.app.state.context.tenants.set_quotas(fresh.quotas)
    path = "/v1/responses"
    with fresh.http(headers={"x-api-key": "kt"}) as http:
        with http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200
            if not stream:
                answer.read()
        charged = tokens.limit - left()
        assert charged > 500, "the HTTP request has ended, the response has not"
        ((_, response_id),) = fresh.app.state.context.background._running
        response = http.post(f"{path}/{response_id}/cancel").json()
    assert response["status"] == "cancelled"
    assert tokens.limit - left() == response["usage"]["total_tokens"] < charged


def complete_get(server):
    with server.http() as http:
        return http.get("/v1/models", headers={"x-api-key": "kt"})


def test_a_stream_is_settled_when_it_ends(fresh) -> None:
    response = complete(fresh, "kt", 70, stream=True)
    assert response.text.endswith("data: [DONE]\n\n")
    assert rate_headers(response)["remaining-tokens"] == "10", "the headers come before the answer"
    assert rate_headers(complete_get(fresh))["remaining-tokens"] == "74"


def test_openais_client_waits_as_it_is_told(fresh, monkeypatch) -> None:
    """The client sleeps before its retry; here the clock turns instead."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        NOW[0] += seconds

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{fresh.url}/v1", api_key="ks") as client:
            for _ in range(4):
                await client.completions.create(model=MODEL, prompt=[7], max_tokens=1)

    monkeypatch.setattr(anyio, "sleep", sleep)
    asyncio.run(main())
    assert slept == [20.0]


def test_allowed_models_and_priority_of_a_key(start_server) -> None:
    quotas = {"narrow": TenantQuotas(allowed_models=("alias",), highest_priority=-3)}
    server = start_server(api_keys={"narrow": "kn", "wide": "kw"}, quotas=quotas)
    with server.http() as http:
        listed = {
            key: [
                model["id"]
                for model in http.get("/v1/models", headers={"x-api-key": key}).json()["data"]
            ]
            for key in ("kn", "kw")
        }
        one = http.get(f"/v1/models/{MODEL}", headers={"x-api-key": "kn"})
    assert listed == {"kn": ["alias"], "kw": [MODEL, "alias"]}
    assert one.status_code == 403
    refused = complete(server, "kn")
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert complete(server, "kn", model="alias").status_code == 200
    assert complete(server, "kn", model="").json()["model"] in ("alias", "")
    low = complete(server, "kn", model="alias", priority=-4)
    assert low.status_code == 400 and "at least -3" in low.json()["error"]["message"]
    assert complete(server, "kw", priority=-4).status_code == 200
