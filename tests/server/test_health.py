"""Models, version and health."""

from __future__ import annotations

import openai
import pytest
from fake_engine import MODEL


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "alias"]
    assert models[0].max_model_len == 2048
    assert {model.root for model in models} == {MODEL}
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("unknown/model")
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
