"""Adapters of a real server: named in requests, loaded and unloaded, there after a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from adapter_files import write_adapter

KEYS = ("--api-key", "alice:a-key", "--api-key", "bob:b-key", "--operator-key", "o-key")


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Adapters of the tiny model by number."""
    root = tmp_path_factory.mktemp("adapters")

    def folder(number: int) -> Path:
        return write_adapter(root / str(number), tiny_model, seed=number, size=2.0)

    return folder


@pytest.fixture(scope="module")
def server(start: Callable, folders: Callable[[int], Path]):
    return start("--lora", f"sql={folders(1)}")


def text_of(server, model: str, content: str = "count to ten", **fields: object) -> str:
    server.model = model
    answer = server.chat(content, temperature=0, max_tokens=24, ignore_eos=True, **fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model"] == model
    return body["choices"][0]["message"]["content"]


def change(server, action: str, key: str = "", **body: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{server.url}/v1/{action}_lora_adapter"
    return httpx.post(url, json=body, headers=headers, timeout=120)


def test_adapters_are_models_loaded_and_unloaded_over_http(server, folders) -> None:
    base, sql = text_of(server, "tiny"), text_of(server, "sql")
    assert sql == text_of(server, "tiny:sql") != base
    assert base == text_of(server, "tiny")
    assert change(server, "load", lora_name="two", lora_path=str(folders(2))).status_code == 200
    two = text_of(server, "two")
    assert two not in (base, sql)
    listed = {m["id"]: (m["root"], m["parent"]) for m in server.get("/v1/models").json()["data"]}
    assert listed == {"tiny": ("tiny", None), "sql": ("sql", "tiny"), "two": ("two", "tiny")}
    completion = {"model": "two", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=completion).json()["model"] == "two"
    inputs = [{"model": name, "input": "x"} for name in ("tiny", "two")]
    vectors = [httpx.post(f"{server.url}/v1/embeddings", json=body).json() for body in inputs]
    assert vectors[0]["data"][0]["embedding"] != vectors[1]["data"][0]["embedding"]
    again = change(server, "load", lora_name="two", lora_path=str(folders(2)))
    assert again.status_code == 400 and "loaded already" in again.json()["error"]["message"]
    assert change(server, "unload", lora_name="two").status_code == 200
    assert change(server, "unload", lora_name="two").status_code == 404
    server.model = "two"
    gone = server.chat()
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"


@pytest.mark.nightly
def test_a_request_with_an_adapter_is_continued_after_a_crash(server, folders) -> None:
    change(server, "load", lora_name="late", lora_path=str(folders(3))).raise_for_status()
    fields = {"temperature": 0, "max_tokens": 600, "ignore_eos": True}
    expected = {}
    for name in ("sql", "late"):
        server.model = name
        expected[name] = server.chat("go on", **fields).json()["choices"][0]["message"]["content"]
    (engine,) = psutil.Process(server.process.pid).children()
    for name in ("sql", "late"):
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "go on"}],
            "stream": True,
            **fields,
        }
        text, deltas = "", 0
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=600
        ) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
                    deltas += 1
                if deltas == 20:
                    (engine,) = psutil.Process(server.process.pid).children()
                    engine.kill()
        assert text == expected[name]
    assert "2 live requests" not in server.log.read_text()
    assert server.log.read_text().count("the engine process runs again") == 2
    assert change(server, "unload", lora_name="late").status_code == 200


def test_only_operators_change_adapters_and_keys_have_lists(start, folders, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants: {bob: {allowed_models: [tiny, 'tiny:two']}}")
    server = start(*KEYS, "--tenants-file", tenants, "--lora", f"one={folders(1)}")
    two = {"lora_name": "two", "lora_path": str(folders(2))}
    assert change(server, "load", "a-key", **two).status_code == 403
    assert change(server, "load", **two).status_code == 401
    assert change(server, "load", "o-key", **two).status_code == 200
    seen = {}
    for key in ("a-key", "b-key"):
        headers = {"authorization": f"Bearer {key}"}
        models = server.get("/v1/models", headers=headers).json()["data"]
        seen[key] = [model["id"] for model in models]
        for name in ("one", "two", "tiny:two"):
            body = {"model": name, "prompt": "x", "max_tokens": 1}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
            assert answer.status_code == (403 if (key, name) == ("b-key", "one") else 200)
    assert seen == {"a-key": ["tiny", "one", "two"], "b-key": ["tiny", "two"]}
    assert change(server, "unload", "b-key", lora_name="two").status_code == 403
    assert change(server, "unload", "o-key", lora_name="two").status_code == 200


def test_an_unusable_adapter_keeps_the_server_from_starting(
    chunkllama, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", tiny_model, rank=8, r=9)
    done = chunkllama("serve", "--model", tiny_model, "--port", 0, "--lora", f"x={folder}")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert "lora: x: " in line and "has shape [8, 64], rank and base model ask for [9, 64]" in line
