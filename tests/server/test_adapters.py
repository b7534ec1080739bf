"""Adapters as models: which name stands for which, in every endpoint, and who may do what."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import MODEL

from chunkllama.adapter_messages import AdapterInfo
from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import load_settings
from chunkllama_server.config.tenants import TenantQuotas

MESSAGES = [{"role": "user", "content": "hi"}]
KEYS = {"alice": "a-key", "bob": "b-key"}


def info(name: str, *, is_activated: bool = False) -> AdapterInfo:
    return AdapterInfo(
        name=name, folder="/x", rank=8, num_bytes=1, is_activated=is_activated, digest="0"
    )


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def sql(server):
    """The ordinary server with an adapter."""
    server.engine.adapters = {"sql": info("sql")}
    return server


GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
    ("/v1/embeddings", {"input": "hi"}),
    ("/api/chat", {"messages": MESSAGES, "stream": False}),
    ("/api/generate", {"prompt": "hi", "stream": False}),
    ("/api/generate", {"prompt": "hi", "stream": False, "raw": True}),
    ("/api/embed", {"input": "hi"}),
]


@pytest.mark.parametrize(("path", "body"), GENERATING)
def test_every_endpoint_takes_an_adapter_as_model(sql, path: str, body: dict[str, Any]) -> None:
    for model, adapter in (("sql", "sql"), (f"{MODEL}:sql", "sql"), ("alias:sql", "sql"),
                           (MODEL, ""), ("alias", "")):  # fmt: skip
        response = sql.post(path, {"model": model, **body})
        assert response.status_code == 200, response.text
        assert sql.engine.requests[-1].adapter == adapter
        if path != "/api/embed" or "model" in response.json():
            assert response.json().get("model", model) == model
    count = len(sql.engine.requests)
    for model in ("other", f"{MODEL}:other", "other:sql", "sql:sql", f"{MODEL}:", ":sql"):
        assert sql.post(path, {"model": model, **body}).status_code == 404
    assert len(sql.engine.requests) == count


def test_prompts_are_tokenized_and_explained_for_an_adapter(sql) -> None:
    for path in ("/tokenize", "/v1/cache/explain"):
        assert sql.post(path, {"model": "sql", "prompt": "hi"}).status_code == 200
        assert sql.post(path, {"model": "no", "prompt": "hi"}).status_code == 404
    assert sql.engine.explained_adapter == "sql"


def test_ollamas_tag_is_no_part_of_an_adapters_name(sql) -> None:
    body = {"model": "sql:latest", "messages": MESSAGES, "stream": False}
    assert sql.post("/api/chat", body).status_code == 200
    assert sql.engine.requests[-1].adapter == "sql"


def test_adapters_are_listed_with_their_model_as_parent(sql) -> None:
    with sql.http() as http:
        listed = http.get("/v1/models").json()["data"]
        assert [(m["id"], m["root"], m["parent"]) for m in listed] == [
            (MODEL, MODEL, None),
            ("alias", MODEL, None),
            ("sql", "sql", MODEL),
        ]
        one = http.get(f"/v1/models/{MODEL}:sql").json()
        assert (one["id"], one["root"], one["parent"]) == (f"{MODEL}:sql", "sql", MODEL)
        assert http.get("/v1/models/other").status_code == 404
        anthropic = http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
        assert anthropic["last_id"] == "sql"
        assert [m["name"] for m in http.get("/api/tags").json()["models"]] == [
            MODEL,
            "alias",
            "sql",
        ]


def test_a_tenant_with_a_list_uses_what_it_names(start_server) -> None:
    quotas = {
        "alice": TenantQuotas(allowed_models=(f"{MODEL}:sql", MODEL)),
        "bob": TenantQuotas(allowed_models=("later", "alias")),
    }
    server = start_server(api_keys=KEYS, quotas=quotas)
    server.engine.adapters = {"sql": info("sql"), "other": info("other")}
    statuses = {}
    with server.http() as http:
        for name, key in KEYS.items():
            for model in ("sql", f"{MODEL}:sql", "other", MODEL, "alias", ""):
                body = {"model": model, "messages": MESSAGES}
                answer = http.post("/v1/chat/completions", json=body, headers=headers(key))
                statuses[name, model] = answer.status_code
        listed = [
            [m["id"] for m in http.get("/v1/models", headers=headers(key)).json()["data"]]
            for key in KEYS.values()
        ]
    assert listed == [[MODEL, "sql"], ["alias"]]
    allowed = {key for key, status in statuses.items() if status == 200}
    assert allowed == {
        ("alice", "sql"),
        ("alice", f"{MODEL}:sql"),
        ("alice", MODEL),
        ("alice", ""),  # its default is the first it names
        ("bob", "alias"),
    }
    assert statuses["bob", ""] == 404, "the first it names is not loaded yet"
    assert server.engine.requests[3].adapter == "sql"


@pytest.mark.parametrize("action", ["load", "unload"])
def test_only_operators_change_adapters(start_server, action: str) -> None:
    server = start_server(api_keys=KEYS, operator_keys=("o-key",))
    body = {"lora_name": "sql", "lora_path": "/x"}
    path = f"/v1/{action}_lora_adapter"
    if action == "unload":
        del body["lora_path"]
        server.engine.adapters = {"sql": info("sql")}
    for key, status in (("a-key", 403), ("wrong", 401), ("o-key", 200)):
        response = server.post(path, body, **headers(key))
        assert response.status_code == status, response.text
        assert ("sql" in server.engine.adapters) == (
            (action == "load") if status == 200 else (action == "unload")
        )
    chat = {"model": MODEL, "messages": MESSAGES}
    assert server.post("/v1/chat/completions", chat, **headers("o-key")).status_code == 403


def test_without_keys_only_this_machine_changes_adapters(start_server, server) -> None:
    body = {"lora_name": "sql", "lora_path": "/x"}
    assert server.post("/v1/load_lora_adapter", body).status_code == 200
    assert server.engine.adapters["sql"].folder == "/x"
    public = start_server(host="0.0.0.0")
    refused = public.post("/v1/load_lora_adapter", body)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "operator_key"
    assert not public.engine.adapters


def test_requests_that_cannot_be_done_are_named(server) -> None:
    server.engine.adapters = {"busy": info("busy")}

    def change(action: str, **body: Any) -> tuple[int, str, str]:
        response = server.post(f"/v1/{action}_lora_adapter", body)
        error = response.json()["error"]
        return response.status_code, error["code"], error["param"]

    assert change("load", lora_name=MODEL, lora_path="/x")[::2] == (400, "lora_name")
    assert change("load", lora_name="a:b", lora_path="/x")[::2] == (400, "lora_name")
    assert change("load", lora_name="", lora_path="/x")[::2] == (400, "lora_name")
    assert change("load", lora_name="a")[::2] == (400, "lora_path")
    refused = change("load", lora_name="a", lora_path="/refuse")
    assert refused == (400, "adapter_refused", "lora_path")
    assert change("unload", lora_name="busy") == (409, "adapter_in_use", "lora_name")
    assert change("unload", lora_name="a") == (404, "adapter_not_found", "lora_name")


def test_the_setting_reads_flags_variables_and_a_mapping(tmp_path) -> None:
    expected = {"a": "/x=1", "b": "/y"}
    assert load_settings({"lora": ["a=/x=1", "b=/y"]}, {}).settings.adapter_folders == expected
    environ = {"CHUNKLLAMA_LORA": "a=/x=1, b=/y"}
    assert load_settings({}, environ).settings.adapter_folders == expected
    (tmp_path / "c.yaml").write_text("lora: {a: /x=1, b: /y}\n")
    loaded = load_settings({}, {}, tmp_path / "c.yaml")
    assert loaded.settings.adapter_folders == expected
    for bad in ("a", "=x", "a=", "a:b=x", "a=x,a=y"):
        with pytest.raises(ConfigError, match="lora: "):
            load_settings({"lora": [bad]}, {})
