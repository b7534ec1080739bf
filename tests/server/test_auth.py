"""API keys: every route but health asks for one, whatever the request looks like."""

from __future__ import annotations

import hmac
import socket

import httpx
import openai
import pytest
from fake_engine import MODEL

from chunkllama_server.transport import auth
from chunkllama_server.transport.key_index import KeyIndex


@pytest.fixture(scope="module")
def guarded(start_server):
    return start_server(api_keys={"a": "secret-key-a", "b": "secret-key-b"})


def status_of_raw(server, request: str) -> int:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as sock:
        sock.sendall(request.encode())
        return int(sock.recv(64).split()[1])


def test_right_key_and_wrong_key(guarded):
    guarded.client("secret-key-b").models.list()
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client("secret-key-c").models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_headers_that_carry_a_key(guarded, header):
    value = "secret-key-a" if header == "x-api-key" else "bearer secret-key-a"
    with guarded.http() as http:
        assert http.get("/v1/models", headers={header: value}).status_code == 200


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Basic secret-key-a", "secret-key-a", "Bearer secret-key-aa"]
)
def test_headers_that_do_not(guarded, value):
    with guarded.http() as http:
        response = http.get("/v1/models", headers={"authorization": value})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


def test_every_route_of_the_document_and_more(guarded):
    document = guarded.app.openapi()
    paths = [
        path.replace("{model}", "x").replace("{response_id}", "x") for path in document["paths"]
    ]
    extra = ["/docs", "/redoc", "/openapi.json", "/", "//v1/models", "/V1/models", "/health/",
             "/health/ready/", "/v1/models/", "/metrics/", "/health/live/x",
             "/nothing"]  # fmt: skip
    with guarded.http() as http:
        for path in [*paths, *extra]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
                status = http.request(method, guarded.url + path).status_code
                is_open = path.rstrip("/") in auth.OPEN_PATHS
                is_open |= path == "/" and method in ("GET", "HEAD")
                assert (status != 401) == is_open, (method, path, status)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "/v1/../health",
        "/health/../v1/models",
        "//health",
        "/health/..%2fv1/models",
        "/%2e/health",
        "/health%00",
    ],
)
@pytest.mark.parametrize("host", ["a/health?x", "localhost/health", "evil"])
def test_host_header_cannot_open_a_route(guarded, target, host):
    request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert status_of_raw(guarded, request) in (400, 401)


@pytest.mark.parametrize("root", ["", "/llm"])
def test_the_root_is_open_to_readers_alone(start_server, root):
    server = start_server(api_keys={"a": "secret-key-a"}, root_path=root)
    page = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    with httpx.Client(timeout=120) as http:
        for path in {"/", f"{root}/", root}:
            url = server.url + path
            assert http.get(url).text == "Ollama is running"
            assert http.head(url).status_code == 200
            shown = http.get(url, headers=page)
            assert (shown.status_code, shown.next_request.url.path) == (307, f"{root}/dashboard")
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                assert http.request(method, url, json={"inputs": "a"}).status_code == 401
        assert http.get(f"{server.url}{root}/v1").status_code == 401


@pytest.mark.parametrize("path", sorted(auth.OPEN_PATHS))
@pytest.mark.parametrize("end", ["", "/", "//"])
def test_health_is_open(guarded, path, end):
    with guarded.http() as http:
        expected = 404 if path == "/dashboard" else 200  # no dashboard in these servers
        assert http.get(path + end).status_code == expected


def test_S16_operators_keys_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert auth.Tenants(operator_keys=("k1", "k2")).is_operator(b"k1")
    assert compared == [b"k1", b"k2"], "every key is compared, also after a match"


def test_S16_a_key_is_found_at_the_same_cost_however_many_there_are(monkeypatch):
    tenants = auth.Tenants({f"t{i}": f"k{i}" for i in range(5000)})
    digest, hashed = KeyIndex._digest, []

    def noting(index: KeyIndex, key: bytes) -> bytes:
        hashed.append(digest(index, key))
        return hashed[-1]

    monkeypatch.setattr(KeyIndex, "_digest", noting)
    found = [tenants.tenant_of(key) for key in (b"k0", b"k4999", b"k5000", b"", b"\xff" * 9000)]
    assert found == ["t0", "t4999", None, None, None]
    assert len(hashed) == 5, "one digest a look-up, and no key is compared"
    other = auth.Tenants({"t0": "k0"})
    assert other.tenant_of(b"k0") == "t0"
    assert hashed[-1] not in hashed[:5], "the digests of a server are its own"


def test_keys_are_replaced_together():
    tenants = auth.Tenants(keys := {"a": "ka", "b": "kb"})
    tenants.set_keys({"b": "new", "c": "kc"})
    assert keys == {"b": "new", "c": "kc"}, "for those that hold the mapping"
    found = [tenants.tenant_of(key) for key in (b"ka", b"kb", b"new", b"kc")]
    assert found == [None, None, "b", "c"]
    tenants.set_keys(tenants.keys)
    assert tenants.tenant_of(b"kc") == "c"


def test_S18_keys_never_show(guarded, capfd):
    with guarded.http() as http:
        headers = {"authorization": "Bearer secret-key-a"}
        texts = [http.get(p, headers=headers).text for p in ("/metrics", "/v1/models", "/x")]
        texts.append(http.get("/v1/models", headers={"authorization": "Bearer canary-key"}).text)
    captured = capfd.readouterr()
    everything = "".join([*texts, captured.out, captured.err, repr(guarded.app.state.context)])
    assert "canary-key" not in everything
    assert "secret-key" not in everything


def test_cors_preflight_needs_no_key(start_server):
    server = start_server(api_keys={"a": "k"}, cors_origins=("https://app.example",))
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with server.http() as http:
        allowed = http.options("/v1/chat/completions", headers=preflight)
        other = http.options(
            "/v1/chat/completions", headers={**preflight, "origin": "https://evil.example"}
        )
        plain = http.options("/v1/chat/completions")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in other.headers
    assert plain.status_code == 401


def test_root_path_of_a_proxy(start_server):
    server = start_server(api_keys={"a": "k"}, root_path="/llm")
    with server.http() as http:
        for prefix in ("", "/llm"):
            assert http.get(f"{prefix}/health/live").status_code == 200
            assert http.get(f"{prefix}/v1/models").status_code == 401
            answer = http.get(f"{prefix}/v1/models", headers={"authorization": "Bearer k"})
            assert answer.json()["data"][0]["id"] == MODEL


def test_a_key_cannot_exceed_its_highest_priority(guarded):
    client = guarded.client("secret-key-a")
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": MODEL, "max_tokens": 1}
    for priority in (-1000, -11):
        with pytest.raises(openai.BadRequestError, match="priority must be at least -10") as caught:
            client.chat.completions.create(**chat, extra_body={"priority": priority})
        assert caught.value.param == "priority"
        with pytest.raises(openai.BadRequestError, match="priority must be at least -10"):
            client.completions.create(
                model=MODEL, prompt="hi", max_tokens=1, extra_body={"priority": priority}
            )
    client.chat.completions.create(**chat, extra_body={"priority": -10})


def test_a_tier_and_a_priority_together_stay_in_the_keys_range(guarded):
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": MODEL, "max_tokens": 1}
    extra = {"priority": -10, "service_tier": "priority"}
    guarded.client("secret-key-a").chat.completions.create(**chat, extra_body=extra)
    assert guarded.engine.requests[-1].priority == -10
    assert guarded.engine.requests[-1].tenant == "a"
