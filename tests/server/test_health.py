"""Models, version, health and metrics."""

from __future__ import annotations

import openai
import pytest
from fake_engine import MODEL

from chunkllama.engine.messages import EngineStats
from server.metrics import EngineStatsCollector


def metric(server, name: str) -> float:
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "alias"]
    assert models[0].max_model_len == 2048
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/nothing")
    assert caught.value.code == "model_not_found"


def test_version(server):
    with server.http() as http:
        assert http.get("/version").json() == {"version": "0.1.0"}


def test_health_follows_the_engine_but_liveness_does_not(server):
    with server.http() as http:
        assert http.get("/health").status_code == http.get("/health/ready").status_code == 200
        server.engine.is_ready = False
        assert http.get("/health/live").status_code == 200
        for path in ("/health", "/health/ready"):
            response = http.get(path)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
    assert server.chat().status_code == 503


def test_draining_refuses_new_work(server):
    lifecycle = server.app.state.context.lifecycle
    lifecycle.draining = True
    try:
        response = server.chat()
    finally:
        lifecycle.draining = False
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"


def test_metrics_show_engine_snapshot(server):
    server.engine.statistics = EngineStats(
        steps_total=10**6,
        prefill_tokens_computed_total=1024,
        prefix_tokens_hit_total=77,
        chunks_free=3,
        chunks_cached=61,
        chunks_total=64,
        chunks_peak=62,
    )
    assert metric(server, "chunkllama_prefill_tokens_computed_total") >= 1024
    assert metric(server, "chunkllama_prefix_tokens_hit_total") >= 77
    assert metric(server, 'chunkllama_kv_chunks{state="cached"}') == 61
    assert metric(server, "chunkllama_kv_chunks_peak") == 62


def test_metrics_survive_an_engine_that_is_gone(server):
    server.engine.is_ready = False
    assert metric(server, "chunkllama_requests_live") == 0


def test_every_accepted_request_has_one_end(server):
    def finished() -> float:
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        name = "chunkllama_request_finished_total{"
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    accepted = metric(server, "chunkllama_request_accepted_total")
    ended = finished()
    server.chat()
    server.chat("say(abc)yas", stop="b", stream=True)
    assert metric(server, "chunkllama_request_accepted_total") == accepted + 2
    assert finished() == ended + 2
    assert metric(server, "chunkllama_requests_live") == 0


def test_refusals_are_counted_by_status(server):
    name = 'chunkllama_request_rejected_total{why="400"}'
    server.chat(n=0)
    before = metric(server, name)
    server.chat(n=0)
    assert metric(server, name) == before + 1


def test_counters_go_on_when_an_engine_starts_from_zero():
    collector = EngineStatsCollector()
    for stats in (
        EngineStats(steps_total=10, prompt_tokens_total=100),
        EngineStats(steps_total=2, prompt_tokens_total=5),
    ):
        collector.update(stats)
    values = {metric.name: metric.samples[0].value for metric in collector.collect()}
    assert values["chunkllama_prompt_tokens"] == 105
    assert values["chunkllama_engine_restarts"] == 1
