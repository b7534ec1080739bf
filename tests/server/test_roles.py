"""Who may read what: every route with no key, a tenant's, another tenant's and an operator's."""

from __future__ import annotations

import io
import json
import logging

import pytest

from chunkllama.errors import ConfigError
from chunkllama.logger import JsonFormatter, TextFormatter
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import OPEN_PATHS, OPERATOR_PATHS

KEYS = {"none": "", "tenant": "ka", "other tenant": "kb", "operator": "ko"}


@pytest.fixture(scope="module")
def guarded(start_server):
    from chunkllama_server.api import dashboard

    server = start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))
    server.app.include_router(dashboard.router)
    return server


def _routes(app) -> list[tuple[str, str]]:
    found = []
    pending = list(app.routes)
    while pending:
        route = pending.pop()
        pending += getattr(getattr(route, "original_router", route), "routes", [])
        if getattr(route, "methods", None):
            found += [(method, route.path) for method in route.methods if method != "HEAD"]
    return sorted(set(found))


def _expected(path: str, who: str) -> str:
    if path in OPEN_PATHS:
        return "open"
    if who == "none":
        return "401"
    if who == "operator" and path not in OPERATOR_PATHS:
        return "403"
    return "open"


def test_every_route_by_key(guarded) -> None:
    routes = _routes(guarded.app)
    assert {("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/dashboard/data")} <= {
        *routes
    }
    table, expected = {}, {}
    with guarded.http() as http:
        for method, path in routes:
            for who, key in KEYS.items():
                headers = {"authorization": f"Bearer {key}"} if key else {}
                url = path.replace("{", "").replace("}", "")
                status = http.request(method, url, headers=headers, json={}).status_code
                table[method, path, who] = str(status) if status in (401, 403) else "open"
                expected[method, path, who] = _expected(path, who)
                assert status < 500
    assert table == expected


def _complete(server, key: str) -> None:
    body = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}
    assert server.post("/v1/completions", body, **{"x-api-key": key}).status_code == 200


def test_a_tenant_reads_no_other_tenants_metrics(guarded) -> None:
    guarded.engine.reset()
    for key in ("ka", "kb"):
        _complete(guarded, key)
    with guarded.http() as http:
        texts = {
            key: http.get("/metrics", headers={"x-api-key": key}).text for key in ("ka", "kb", "ko")
        }
    assert 'tenant="alpha"' in texts["ka"] and "beta" not in texts["ka"]
    assert 'tenant="beta"' in texts["kb"] and "alpha" not in texts["kb"]
    assert 'tenant="alpha"' in texts["ko"] and 'tenant="beta"' in texts["ko"]
    assert all("chunkllama_kv_chunks_capacity" in text for text in texts.values())


def test_only_an_operator_sees_every_node(guarded) -> None:
    from chunkllama.messages import EngineStats, TreeNodeInfo

    names = ["", guarded.app.state.context.tenants.namespace("alpha", None), "x" * 32]
    fields = dict.fromkeys(TreeNodeInfo.__struct_fields__, 0)
    guarded.engine.statistics = EngineStats(
        tree=[TreeNodeInfo(**{**fields, "namespace": name}) for name in names]
    )
    guarded.app.state.snapshots = None
    del guarded.app.state.snapshots
    with guarded.http() as http:
        seen = {
            key: [
                node["namespace"]
                for node in http.get("/dashboard/data", headers={"x-api-key": key}).json()["tree"]
            ]
            for key in ("ka", "kb", "ko")
        }
    guarded.engine.reset()
    assert seen == {"ka": names[:2], "kb": names[:1], "ko": names}


def test_log_lines_carry_request_and_tenant(guarded) -> None:
    stream = io.StringIO()
    handlers = [logging.StreamHandler(stream) for _ in range(2)]
    handlers[0].setFormatter(JsonFormatter())
    handlers[1].setFormatter(TextFormatter())
    logger = logging.getLogger("chunkllama")
    level = logger.level
    logger.setLevel("INFO")
    for handler in handlers:
        logger.addHandler(handler)
    try:
        body = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}
        headers = {"x-api-key": "kb", "x-request-id": "me-1"}
        guarded.post("/v1/completions", body, **headers)
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [line for line in stream.getvalue().splitlines() if "generation ended" in line]
    record = json.loads(lines[0])
    assert (record["request_id"], record["tenant"]) == ("me-1", "beta")
    assert "[me-1 beta]" in lines[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"operator_key": ("ko",)},
        {"operator_key": ("ka",), "api_key": ("a:ka",)},
        {"operator_key": ("",), "api_key": ("a:ka",)},
    ],
)
def test_operator_keys_that_give_no_role_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match="operator_key"):
        Settings(**settings).keys_by_tenant()
