"""The admin port's work on the cache, on a real server: pins, branches, tenants, the tree."""

from __future__ import annotations

import hashlib
import json
import socket
from urllib.parse import quote

import httpx
import pytest

from chunkllama.cache.admin import run_command
from chunkllama.cache_messages import CacheCommand
from chunkllama.simulation.engine import SimulatedEngine

ODD_NAMES = ("a", "a/b", "a//b", "a/", "/a", "/", "na\u00efve", "%2e", "..", "tree")
TEXT = "you are a helpful assistant of the company and answer each question briefly " * 3


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    odd = (f"{name}:key-odd{number}" for number, name in enumerate(ODD_NAMES))
    keys.write_text("\n".join(["red:key-red", "blue:key-blue", *odd]))
    served = start("--api-key-file", keys, "--admin-port", port, "--operator-key", "key-op")
    headers = {"authorization": "Bearer key-op"}
    base = f"http://127.0.0.1:{port}/admin/cache"
    return served, httpx.Client(base_url=base, timeout=60, headers=headers)


def complete(served, key: str, prompt: str, **fields) -> int:
    """Run a prompt; returns its cached tokens."""
    body = {"model": served.model, "prompt": prompt, "max_tokens": 1, **fields}
    headers = {"authorization": f"Bearer key-{key}"}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def counts(client) -> dict[str, int]:
    return {row["tenant"]: row["chunks"] for row in client.get("/tree").json()["tenants"]}


def test_an_operator_works_on_the_cache(server) -> None:
    served, client = server
    assert complete(served, "red", TEXT) == complete(served, "blue", TEXT) == 0
    assert complete(served, "red", TEXT) == len(TEXT) - 1
    before = counts(client)
    assert before["red"] == before["blue"] == -(-len(TEXT) // 64)

    tree = client.get("/tree", params={"tenant": "red"}).json()
    assert [node["depth"] for node in tree["nodes"]] == [0, 1, 2, 3]
    assert {node["tenant"] for node in tree["nodes"]} == {"red"} and tree["hidden_nodes"] == 0
    assert not {"tokens", "token_ids", "key"} & set(tree["nodes"][0])

    dropped = client.delete(f"/branches/{tree['nodes'][2]['chunk_id']}").json()
    assert dropped == {"object": "dropped", "chunks": 2, "kept": 0}
    assert counts(client) == before | {"red": 2}
    explained = httpx.post(
        f"{served.url}/v1/cache/explain",
        json={"prompt": TEXT},
        headers={"authorization": "Bearer key-red"},
    ).json()
    assert (explained["reason"], explained["matched_tokens"]) == ("dropped", 128)

    assert client.delete("/tenants/blue").json()["chunks"] == before["blue"]
    assert "blue" not in counts(client)
    assert complete(served, "blue", TEXT) == 0
    assert complete(served, "red", TEXT) == 128


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_tenant_of_any_name_can_be_dropped(server, name) -> None:
    served, client = server
    complete(served, f"odd{ODD_NAMES.index(name)}", TEXT)
    assert counts(client)[name] == 4
    listed = client.get("/tree", params={"tenant": name}).json()
    assert [node["tenant"] for node in listed["nodes"]] == [name] * 4
    dropped = client.delete(f"/tenants/{quote(name, safe='').replace('.', '%2E')}")
    assert dropped.json() == {"object": "dropped", "chunks": 4, "kept": 0}
    assert name not in counts(client)


def test_events_follow_what_is_stored_and_dropped(server) -> None:
    served, client = server
    prompt = "events of the cache " * 10
    with client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = read_events(answer)
        first = next(events)
        assert first["type"] == "cleared" and first["chunk_size"] == 64
        present = [next(events) for _ in range(first["chunks"])]
        assert {event["type"] for event in present} <= {"stored"}
        complete(served, "red", prompt)
        stored = [next(events) for _ in range(len(prompt) // 64)]
        ids = httpx.post(
            f"{served.url}/tokenize",
            json={"prompt": prompt, "add_special_tokens": False},
            headers={"authorization": "Bearer key-red"},
        ).json()["tokens"]
        above, parent = b"", None
        for depth, event in enumerate(stored):
            part = ids[64 * depth : 64 * depth + 64]
            above = hashlib.sha256(above + b"".join(i.to_bytes(4, "big") for i in part)).digest()
            above = above[:16]
            assert event == {
                "type": "stored", "chunk_id": event["chunk_id"], "hash": above.hex(),
                "parent_hash": parent, "depth": depth, "tenant": "red", "is_public": False,
            }  # fmt: skip
            parent = event["hash"]
        client.delete(f"/branches/{stored[0]['chunk_id']}")
        removed = [next(events) for _ in stored]
        assert [event["type"] for event in removed] == ["removed"] * len(stored)
        assert [event["hash"] for event in removed] == [e["hash"] for e in reversed(stored)]


def read_events(answer):
    """The data of each server-sent event, checked against its name."""
    name = None
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            assert data["type"] == name
            yield data


def test_pins_are_listed_added_and_dropped(server) -> None:
    served, client = server
    answer = client.post("/pins", json={"prompt": "pinned " * 20, "tenant": "red", "ttl": "5m"})
    assert answer.json() == {"object": "pin", "tenant": "red", "prompt_tokens": 140}
    (pin,) = client.get("/pins").json()["data"]
    assert (pin["tenant"], pin["num_tokens"], pin["num_chunks"]) == ("red", 140, 3)
    assert 0 < pin["seconds_left"] <= 300
    assert complete(served, "red", "pinned " * 20) == 139
    assert complete(served, "blue", "pinned " * 20) == 0
    path = f"/pins/{pin['chunk_id']}"
    assert client.delete(path, params={"tenant": "blue"}).status_code == 404
    assert client.delete(path, params={"tenant": "red"}).status_code == 200
    assert client.get("/pins").json()["data"] == []
    assert complete(served, "red", "pinned " * 20) == 139

    shared = {"messages": [{"role": "user", "content": "for all " * 20}], "ttl": "30s"}
    assert client.post("/pins", json=shared).status_code == 200
    (pin,) = client.get("/pins").json()["data"]
    assert pin["tenant"] == ""
    assert client.delete(f"/branches/{pin['chunk_id']}").json()["chunks"] == 1
    assert client.get("/pins").json()["data"] == []

    by_ids = {"prompt": [65] * 70, "tenant": "red", "ttl": "30s"}
    assert client.post("/pins", json=by_ids).json()["prompt_tokens"] == 70
    (pin,) = client.get("/pins").json()["data"]
    assert (pin["num_tokens"], pin["num_chunks"]) == (70, 2)
    assert client.delete(f"/branches/{pin['chunk_id']}").json()["chunks"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/pins", {"prompt": "x"}, 400, "ttl"),
        ("POST", "/pins", {"prompt": "x", "ttl": "soon"}, 400, "ttl"),
        ("POST", "/pins", {"prompt": "x", "ttl": "99999h"}, 400, "ttl"),
        ("POST", "/pins", {"ttl": "5m"}, 400, "prompt"),
        ("POST", "/pins", {"prompt": "x", "ttl": "5m", "tenant": "green"}, 404, "tenant"),
        ("POST", "/pins", {"prompt": "x" * 5000, "ttl": "5m"}, 400, "prompt"),
        ("POST", "/pins", {"prompt": "y" * 1000, "tenant": "red", "ttl": "5m"}, 200, None),
        ("POST", "/pins", {"prompt": "z" * 1000, "tenant": "red", "ttl": "5m"}, 409, "ttl"),
        ("DELETE", "/pins/9999", None, 404, None),
        ("DELETE", "/branches/9999", None, 404, None),
        ("DELETE", "/branches/x", None, 400, "chunk_id"),
        ("DELETE", "/tenants/green", None, 404, None),
    ],
)
def test_refusals_name_what_is_wrong(server, method, path, body, status, param) -> None:
    _, client = server
    answer = client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("key", ["", "key-red", "key-o", "key-op2"])
def test_changes_need_an_operators_key_and_reading_none(server, key) -> None:
    served, client = server
    before = counts(client)
    assert complete(served, "blue", "kept " * 30) >= 0
    after = counts(client)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=client.base_url, timeout=60, headers=headers) as http:
        assert counts(http) == after and after["blue"] >= before.get("blue", 0)
        for method, path in (
            ("DELETE", "/tenants/blue"), ("DELETE", "/branches/1"), ("DELETE", "/pins/1"),
            ("POST", "/pins"), ("PUT", "/tree"),
        ):  # fmt: skip
            answer = http.request(method, path, json={"prompt": "x", "ttl": "5m"})
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/pins/").status_code == 200
    assert counts(client) == after


def test_the_main_port_has_no_administration(server) -> None:
    served, _ = server
    headers = {"authorization": "Bearer key-red"}
    for path in ("pins", "tree"):
        assert httpx.get(f"{served.url}/admin/cache/{path}", headers=headers).status_code == 404


def test_chunks_in_use_are_kept() -> None:
    run = SimulatedEngine(40, 4, vocab_size=1000)
    run.add(list(range(10)), 5, tenant="a", namespace="A", pin_seconds=9.0)
    run.run()
    run.add([*range(8), 1, 2, 3], 5, tenant="b", namespace="A")
    run.step()
    drop = CacheCommand(command_id=3, action="drop_tenant", tenant="a")
    reply = run.scheduler.cache_command(drop)
    run.scheduler.check_invariants()
    # two chunks are in use by b; those with a's output go, pinned or not
    assert (reply.command_id, reply.found) == (3, True)
    assert (reply.num_dropped, reply.num_kept) == (2, 2)
    assert run_command(CacheCommand(command_id=4, action="pins"), run.cache, run.now).pins == []
    run.run()
    run.check_outputs()
