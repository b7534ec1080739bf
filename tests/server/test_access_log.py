"""One line a request: what it was and how it ended, never what it carried."""

from __future__ import annotations

import logging

import pytest
from fake_engine import MODEL
from fastapi.testclient import TestClient

from chunkllama_server.transport.access_log import AccessLog


@pytest.fixture
def lines(server, caplog):
    """Sends a request, and returns the lines it leaves."""
    caplog.set_level(logging.INFO, logger="chunkllama")
    client = TestClient(AccessLog(server.app))

    def send(method: str, path: str, **options) -> list[str]:
        caplog.clear()
        client.request(method, path, **options)
        return [r.getMessage() for r in caplog.records if r.name.endswith("access_log")]

    return send


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_probes_leave_none(lines, path):
    assert lines("GET", path) == []


@pytest.mark.parametrize("path", ["/healthy", "/metrics/x", "/v1/x"])
def test_what_only_looks_like_a_probe_leaves_one(lines, path):
    assert lines("GET", path) == [f"GET {path} 404"]


def test_neither_query_nor_body_nor_key_is_in_it(lines):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "say(secret)yas"}]}
    headers = {"authorization": "Bearer secret"}
    path = "/v1/chat/completions"
    assert lines("POST", f"{path}?q=secret", json=body, headers=headers) == [f"POST {path} 200"]
