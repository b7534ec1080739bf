"""What routers ask a server for: its model and sizes, its load, and prompts as token ids."""

from __future__ import annotations

import pytest
from fake_engine import MODEL

from chunkllama.messages import EngineStats, TenantStats
from chunkllama_server.api import dashboard
from chunkllama_server.config.tenants import TenantQuotas
from chunkllama_server.transport.paths import add_routes


def test_server_and_model_info_name_the_served_model_and_no_folder(server) -> None:
    with server.http() as http:
        listed = http.get("/v1/models").json()["data"][0]
        info, model = http.get("/server_info").json(), http.get("/model_info").json()
        assert http.get("/v1/server_info").json() == info
    assert info["served_model_name"] == info["model_path"] == model["model_path"] == listed["id"]
    assert info["context_length"] == listed["max_model_len"]
    engine = server.engine.info
    assert info["max_total_tokens"] == engine.num_chunks * engine.chunk_size
    assert (info["page_size"], info["dp_size"]) == (engine.chunk_size, 1)
    assert model["is_generation"] and not info["is_embedding"]


def test_the_name_is_one_that_the_tenant_may_use(start_server) -> None:
    server = start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))
    server.app.state.context.tenants.set_quotas({"beta": TenantQuotas(allowed_models=("alias",))})
    names = {}
    with server.http() as http:
        for key in ("ka", "kb", "ko"):
            headers = {"x-api-key": key}
            info = http.get("/server_info", headers=headers).json()
            names[key] = info["served_model_name"]
            assert http.get("/model_info", headers=headers).json()["model_path"] == names[key]
    assert names == {"ka": MODEL, "kb": "alias", "ko": MODEL}


def test_loads_are_the_engines_counts(server) -> None:
    server.engine.statistics = EngineStats(
        requests_running=3, requests_waiting=2, chunks_referenced=10, chunks_private=6,
        chunks_cached=20, chunks_total=64,
    )  # fmt: skip
    with server.http() as http:
        body = http.get("/v1/loads?include=core,queues").json()
    size, total = server.engine.info.chunk_size, server.engine.info.num_chunks
    (load,) = body["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (3, 2, 5)
    assert (load["num_used_tokens"], load["max_total_num_tokens"]) == (16 * size, total * size)
    assert load["token_usage"] == pytest.approx(16 / total, abs=1e-4)


def test_a_tenant_reads_its_own_part_of_the_load(start_server) -> None:
    server = start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))
    server.engine.statistics = EngineStats(
        requests_running=8, chunks_referenced=12,
        tenants={"alpha": TenantStats(requests_running=3, requests_waiting=1, chunks_used=2.5)},
    )  # fmt: skip
    seen = {}
    with server.http() as http:
        for key in ("ka", "kb", "ko"):
            (load,) = http.get("/v1/loads", headers={"x-api-key": key}).json()["loads"]
            seen[key] = load["num_running_reqs"], load["num_waiting_reqs"], load["num_used_tokens"]
    size = server.engine.info.chunk_size
    assert seen == {"ka": (3, 1, round(2.5 * size)), "kb": (0, 0, 0), "ko": (8, 0, 12 * size)}


def test_sizes_of_a_cluster_are_those_of_all_replicas(start_server) -> None:
    server = start_server(api_keys={"alpha": "ka"}, operator_keys=("ko",), metrics_compat="vllm")
    add_routes(server.app, dashboard.router)
    context, engine = server.app.state.context, server.engine.info
    states = ("running", "running", "draining")
    context.replicas = lambda: [{"state": state} for state in states]
    total = 3 * engine.num_chunks
    server.engine.statistics = EngineStats(
        steps_total=1, chunks_total=total, chunks_referenced=total - 8, chunks_cached=8,
        tenants={"alpha": TenantStats(chunks_used=total - 8, chunks_cached=8)},
    )  # fmt: skip
    headers = {"x-api-key": "ko"}
    with server.http() as http:
        (load,) = http.get("/v1/loads", headers=headers).json()["loads"]
        info = http.get("/server_info", headers=headers).json()
        tenants = http.get("/dashboard/tenants", headers=headers).json()
        shown = [
            http.get("/dashboard/data", headers={"x-api-key": key}).json() for key in ("ka", "ko")
        ]
        metrics = http.get("/metrics", headers=headers).text
    tokens, running = total * engine.chunk_size, 2 * context.settings.max_num_seqs
    assert (load["max_total_num_tokens"], load["max_running_requests"]) == (tokens, running)
    assert load["token_usage"] == pytest.approx(1 - 8 / total, abs=1e-4)
    assert (info["max_total_tokens"], info["max_running_requests"]) == (tokens, running)
    assert tenants["chunks_total"] == total
    assert tenants["data"][0]["chunks"]["pool_share"] == 1
    for data in shown:
        assert data["info"]["num_chunks"] == data["stats"]["chunks_total"] == total
    assert f'num_gpu_blocks="{total}"' in metrics


def test_render_has_the_token_ids_that_the_engine_gets(server) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "say(ab)yas"}]}
    rendered = server.post("/v1/chat/completions/render", chat).json()
    server.post("/v1/chat/completions", {**chat, "max_tokens": 1})
    sent = server.engine.requests[-1].prompt_token_ids
    assert rendered["token_ids"] == rendered["prompt_token_ids"] == sent


def test_render_of_completions_has_an_entry_for_each_prompt(server, text_parts) -> None:
    prompts = ["say(ab)yas", "héllo"]
    rendered = server.post("/v1/completions/render", {"model": MODEL, "prompt": prompts}).json()
    assert [each["prompt"] for each in rendered] == prompts
    ids = [each["token_ids"] for each in rendered]
    assert ids == [text_parts[0].encode(prompt) for prompt in prompts]
    one = server.post("/v1/completions/render", {"model": MODEL, "prompt": ids[1]}).json()
    assert [each["token_ids"] for each in one] == ids[1:]
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "x" * 3000}, "prompt"),
        ({"prompt": "a", "max_tokens": 99999}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
    ],
)
def test_render_refuses_what_the_completion_would_refuse(server, fields, param) -> None:
    for path in ("/v1/completions", "/v1/completions/render"):
        response = server.post(path, {"model": MODEL, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
