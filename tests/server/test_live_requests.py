"""/dashboard/requests lists what waits and runs, and ends a request for who may end it."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from fake_engine import MODEL

from chunkllama_server.api.admin_app import create_admin_app

BODY = {"model": MODEL, "prompt": "say(abcdef)yas"}


@pytest.fixture(scope="module")
def keyed(start_server):
    return start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))


class Pending:
    """A completion that the engine holds back until ``finish``."""

    def __init__(self, server, key: str = "none", gate_at: int = 0) -> None:
        server.engine.reset()
        server.engine.gate_at = gate_at
        server.engine.gate.clear()
        self._server = server
        self._thread = threading.Thread(target=self._post, args=(key,))
        self._thread.start()
        while not _listed(server, key):
            time.sleep(0.01)

    def _post(self, key: str) -> None:
        self.answer = self._server.post("/v1/completions", BODY, **{"x-api-key": key})

    def finish(self) -> httpx.Response:
        self._server.engine.gate.set()
        self._thread.join()
        return self.answer


def _ask(server, method: str, path: str, key: str = "none") -> httpx.Response:
    with server.http() as http:
        return http.request(method, path, headers={"x-api-key": key})


def _listed(server, key: str = "none") -> list[dict]:
    return _ask(server, "GET", "/dashboard/requests", key).json()["data"]


def test_a_waiting_request_is_listed_with_its_age(server) -> None:
    pending = Pending(server)
    first, second = _listed(server)[0], _listed(server)[0]
    assert first["state"] == "waiting" and first["tenant"] == ""
    assert second["age_seconds"] >= first["age_seconds"] >= 0
    assert first["choices"] == 1 and first["prompt_tokens"] > 10
    assert pending.finish().status_code == 200
    assert _listed(server) == []


def test_a_request_with_a_token_runs(server) -> None:
    pending = Pending(server, gate_at=1)
    while _listed(server)[0]["state"] == "waiting":
        time.sleep(0.01)
    assert pending.finish().status_code == 200


def test_without_keys_only_the_admin_port_ends_requests(server) -> None:
    pending = Pending(server)
    request_id = _listed(server)[0]["request_id"]
    refused = _ask(server, "DELETE", f"/dashboard/requests/{request_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_port_only")
    assert not _ask(server, "GET", "/dashboard/requests").json()["may_abort"]
    assert pending.finish().status_code == 200


def test_a_tenant_sees_and_ends_its_own(keyed) -> None:
    pending = Pending(keyed, "ka")
    assert _listed(keyed, "kb") == []
    assert len(_listed(keyed, "ko")) == 1
    path = f"/dashboard/requests/{_listed(keyed, 'ka')[0]['request_id']}"
    assert _ask(keyed, "DELETE", path, "kb").json()["error"]["code"] == "not_live"
    assert _ask(keyed, "DELETE", path, "ko").status_code == 403
    assert _ask(keyed, "DELETE", path, "ka").json()["object"] == "ended"
    assert keyed.engine.aborted
    answer = pending.finish()
    assert answer.status_code == 410 and answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "aborted"
    metrics = _ask(keyed, "GET", "/metrics", "ko").text
    assert 'chunkllama_request_finished_total{reason="abort",tenant="alpha"} 1.0' in metrics
    assert _ask(keyed, "DELETE", path, "ka").status_code == 404


def test_a_request_is_ended_by_the_id_in_the_log(keyed) -> None:
    pending = Pending(keyed, "ka")
    (row,) = _listed(keyed, "ka")
    path = f"/dashboard/requests/{row['client_request_id']}"
    assert _ask(keyed, "DELETE", path, "kb").status_code == 404
    assert _ask(keyed, "DELETE", path, "ka").json()["count"] == 1
    answer = pending.finish()
    assert answer.status_code == 410
    assert answer.headers["x-request-id"] == row["client_request_id"]


def test_the_admin_port_has_the_page_and_ends_any(keyed) -> None:
    from starlette.testclient import TestClient

    pending = Pending(keyed, "ka")
    admin = TestClient(create_admin_app(keyed.app.state.context), base_url="http://127.0.0.1")
    assert "<title>ChunkLlama</title>" in admin.get("/dashboard").text
    listed = admin.get("/dashboard/requests").json()
    assert listed["may_abort"] and [row["tenant"] for row in listed["data"]] == ["alpha"]
    assert admin.delete("/dashboard/requests/no-such-id").status_code == 401
    admin.headers["x-api-key"] = "ko"  # changes need an operator's key where there is one
    assert admin.delete("/dashboard/requests/no-such-id").status_code == 404
    path = f"/dashboard/requests/{listed['data'][0]['request_id']}"
    assert admin.delete(path).json()["object"] == "ended"
    assert pending.finish().json()["error"]["code"] == "aborted"
    assert admin.delete(path).status_code == 404
    assert admin.get("/dashboard/data").json()["sharing"] == {
        "chunks_in_use": 0,
        "chunks_without_sharing": 0,
    }


@pytest.fixture
def admin(keyed):
    from starlette.testclient import TestClient

    app = create_admin_app(keyed.app.state.context)
    return TestClient(app, base_url="http://127.0.0.1", headers={"x-api-key": "ko"})


def test_all_requests_of_a_tenant_are_ended_at_once(keyed, admin) -> None:
    assert admin.delete("/admin/requests").status_code == 400, "it does not mean all tenants"
    pending = Pending(keyed, "ka")
    counts = [
        admin.delete("/admin/requests", params={"tenant": tenant}).json()
        for tenant in ("beta", "", "alpha")
    ]
    assert counts == [
        {"object": "ended", "tenant": tenant, "count": count}
        for tenant, count in (("beta", 0), ("", 0), ("alpha", 1))
    ]
    assert pending.finish().status_code == 410
    assert admin.delete("/admin/requests?tenant=a", headers={"x-api-key": "kb"}).status_code == 401


def test_the_admin_ports_answers_have_request_ids(admin) -> None:
    given = admin.get("/health/live", headers={"x-request-id": "me-1"})
    assert given.headers["x-request-id"] == "me-1"
    refused = admin.post("/v1/cache/packs", json={"name": "a b\n"})
    assert refused.status_code >= 400 and refused.headers["x-request-id"].startswith("req_")


def test_the_admin_port_describes_itself(admin) -> None:
    document = admin.get("/openapi.json").json()
    assert "swagger" in admin.get("/docs").text.lower()
    assert set(document["paths"]["/admin/requests"]) == {"delete"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == (method != "get"), path
    assert not any("422" in op["responses"] for ops in document["paths"].values()
                   for op in ops.values())  # fmt: skip
