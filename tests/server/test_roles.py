"""Who may read what: every route with no key, a tenant's, another tenant's and an operator's."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re

import httpx
import pytest

from chunkllama.errors import ConfigError
from chunkllama.logger import JsonFormatter, TextFormatter
from chunkllama_server.api.admin_app import create_admin_app
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import OPEN_PATHS, OPERATOR_CHANGES, OPERATOR_PATHS
from chunkllama_server.transport.paths import add_routes

KEYS = {"none": "", "tenant": "ka", "other tenant": "kb", "operator": "ko"}


@pytest.fixture(scope="module")
def guarded(start_server):
    from chunkllama_server.api import dashboard

    server = start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))
    add_routes(server.app, dashboard.router)
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


def _expected(method: str, path: str, who: str) -> str:
    if path in OPEN_PATHS or (method, path) == ("GET", "/"):
        return "open"
    if who == "none":
        return "401"
    if who == "operator" and path not in OPERATOR_PATHS | OPERATOR_CHANGES:
        return "403"
    return "open"


def test_S17_every_route_by_key(guarded) -> None:
    routes = _routes(guarded.app)
    posts = (
        *("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/generate"),
        *("/embed", "/v1/files", "/v1/batches", "/v1/load_lora_adapter", "/v1/cache/explain"),
    )
    assert {*(("POST", path) for path in posts), ("GET", "/metrics")} <= {*routes}
    table, expected = {}, {}
    with guarded.http() as http:
        for method, path in routes:
            for who, key in KEYS.items():
                headers = {"authorization": f"Bearer {key}"} if key else {}
                url = path.replace("{", "").replace("}", "")
                status = http.request(method, url, headers=headers, json={}).status_code
                table[method, path, who] = str(status) if status in (401, 403) else "open"
                expected[method, path, who] = _expected(method, path, who)
                assert status < 500
    assert table == expected


@pytest.mark.parametrize("path", sorted(OPERATOR_PATHS))
def test_an_operator_may_spell_a_path_as_tenants_may(guarded, path) -> None:
    spellings = (path, f"{path}/", f"/{path}", f"/v1{path}", f"/v1/v1{path.removeprefix('/v1')}")
    with guarded.http() as http:
        found = {
            spelling: [
                http.get(f"{guarded.url}{spelling}", headers={"x-api-key": key}).status_code
                for key in ("ka", "ko")
            ]
            for spelling in spellings
        }
    assert found[path][1] == 200
    for tenants, operators in found.values():
        assert tenants == operators or (tenants, operators) == (404, 403)


def test_the_dashboards_page_opens_no_file(guarded, monkeypatch) -> None:
    """A flood of connections may have left no descriptor."""
    from importlib import resources

    def fail(_: str) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(resources, "files", fail)
    with guarded.http() as http:
        answer = http.get("/dashboard")
    assert answer.status_code == 200 and "</html>" in answer.text


READING = ("GET", "HEAD", "OPTIONS")


@pytest.mark.parametrize(
    ("admin_host", "operators", "unkeyed"),
    [
        ("127.0.0.1", ("ko",), "401"),
        ("::1", (), "open"),
        ("localhost", (), "open"),
        ("0.0.0.0", ("ko",), "401"),
        ("0.0.0.0", (), "403"),
        ("::", (), "403"),
        ("10.1.2.3", (), "403"),
    ],
)
def test_every_route_of_the_admin_port_by_key(start_server, admin_host, operators, unkeyed) -> None:
    """Reading needs no key; a change needs an operator's, or a port for this machine alone."""
    keys = {"alpha": "ka", "beta": "kb"}
    server = start_server(api_keys=keys, operator_keys=operators, admin_host=admin_host)
    admin = create_admin_app(server.app.state.context)
    routes = _routes(admin)
    assert {("GET", "/metrics"), ("GET", "/v1/usage"), ("GET", "/admin/cache/tree")} <= {*routes}
    changing = {(method, path) for method, path in routes if method not in READING}
    assert len(changing) == 9

    async def ask() -> dict[tuple[str, str, str], str]:
        transport = httpx.ASGITransport(admin, raise_app_exceptions=False)
        table = {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            for method, path in routes:
                for who, key in KEYS.items():
                    headers = {"authorization": f"Bearer {key}"} if key else {}
                    url = path.replace("{", "").replace("}", "")
                    status = (await http.request(method, url, headers=headers)).status_code
                    table[method, path, who] = str(status) if status in (401, 403) else "open"
        return table

    expected = {
        (method, path, who): "open"
        if method in READING or (operators and who == "operator")
        else unkeyed
        for method, path in routes
        for who in KEYS
    }
    assert asyncio.run(ask()) == expected


@pytest.mark.parametrize(
    ("admin_host", "name", "status"),
    [("127.0.0.1", "evil.example", 403), ("127.0.0.1", "localhost:9000", 200),
     ("127.0.0.1", "llm.example.org", 200), ("0.0.0.0", "metrics.example.org", 200)],
)  # fmt: skip
def test_a_rebound_name_does_not_reach_a_local_admin_port(
    start_server, admin_host, name, status
) -> None:
    server = start_server(admin_host=admin_host, host="0.0.0.0", allowed_hosts=["llm.example.org"])
    admin = create_admin_app(server.app.state.context)

    async def ask() -> int:
        transport = httpx.ASGITransport(admin)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return (await http.get("/health/live/", headers={"host": name})).status_code

    assert asyncio.run(ask()) == status


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


# Series without a tenant: constants, and gauges of which a tenant sees its own part.
PARTS = {
    "chunkllama_info", "chunkllama_kv_chunks_capacity", "chunkllama_kv_chunks_total",
    "chunkllama_requests_live", "chunkllama_requests_running", "chunkllama_requests_waiting",
    "chunkllama_kv_chunks_pinned",
}  # fmt: skip


def _samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_tenant_reads_no_totals_of_all_tenants(guarded) -> None:
    guarded.engine.reset()

    def read(key: str) -> str:
        with guarded.http() as http:
            return http.get("/metrics", headers={"x-api-key": key}).text

    _complete(guarded, "kb")
    before = _samples(read("kb"))
    for key in ("ka", "kb", "kb"):
        _complete(guarded, key)
    operator = _samples(read("ko"))
    assert "chunkllama_generation_tokens_total" in operator
    for key in ("ka", "kb"):
        unlabelled = {
            name.partition("{")[0] for name in _samples(read(key)) if "tenant=" not in name
        }
        assert unlabelled == PARTS
    after = _samples(read("kb"))
    names = {
        'request_finished_total{reason="length",tenant="beta"}': 2,
        'tenant_prompt_tokens_total{tenant="beta"}': 2 * len("say(ab)yas"),
        'tenant_cached_tokens_total{tenant="beta"}': 2 * (len("say(ab)yas") - 1),
        'tenant_output_tokens_total{tenant="beta"}': 2 * 2,
        "requests_live": 0,
    }
    full = {name: f"chunkllama_{name}" for name in names}
    assert {name: after[full[name]] - before[full[name]] for name in names} == names


def test_a_tenant_sees_its_own_part_of_the_gauges(guarded) -> None:
    from chunkllama.messages import EngineStats, TenantStats

    guarded.engine.reset()
    parts = {"alpha": TenantStats(requests_running=3), "beta": TenantStats(requests_running=5)}
    guarded.engine.statistics = EngineStats(steps_total=10**9, requests_running=8, tenants=parts)
    seen = {}
    with guarded.http() as http:
        for key in ("ka", "kb", "ko"):
            text = http.get("/metrics", headers={"x-api-key": key}).text
            seen[key] = _samples(text)["chunkllama_requests_running"]
    guarded.engine.reset()
    assert seen == {"ka": 3, "kb": 5, "ko": 8}


def test_a_tenants_dashboard_shows_its_own_part(guarded) -> None:
    from chunkllama.cache_messages import TreeNodeInfo
    from chunkllama.messages import EngineStats

    guarded.engine.reset()
    _complete(guarded, "ka")
    own = guarded.app.state.context.tenants.namespace("alpha", None)
    fields = dict.fromkeys(TreeNodeInfo.__struct_fields__, 0) | {"state": "referenced"}
    guarded.engine.statistics = EngineStats(
        generation_tokens_total=987_654,
        evicted_chunks_total=876_543,
        requests_waiting=765_432,
        tree=[
            TreeNodeInfo(**fields | {"namespace": name, "num_sequences": 654_321 if name else 543})
            for name in ("", own, "x" * 32)
        ],
    )
    shown = {}
    for key in ("ka", "ko"):
        guarded.app.state.snapshots = None
        del guarded.app.state.snapshots
        with guarded.http() as http:
            shown[key] = http.get("/dashboard/data", headers={"x-api-key": key})
    guarded.engine.reset()
    totals = ("987654", "876543", "765432", "543")
    assert all(total in shown["ko"].text for total in totals)
    mine = shown["ka"].json()
    assert not any(re.search(rf"\b{total}\b", shown["ka"].text) for total in totals)
    assert (mine["view"], mine["hidden_nodes"]) == ("tenant", 0)
    assert [(n["namespace"], n["num_sequences"], n["state"]) for n in mine["tree"]] == [
        ("", 0, "cached"),
        (own, 654_321, "referenced"),
    ]
    assert (
        mine["stats"]["generation_tokens_total"] % 2
        == 0
        < mine["latency"]["e2e_request_latency"]["count"]
    )
    assert mine["stats"]["chunks_referenced"] == mine["stats"]["chunks_cached"] == 1


def test_only_an_operator_sees_every_node(guarded) -> None:
    from chunkllama.cache_messages import TreeNodeInfo
    from chunkllama.messages import EngineStats

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


def test_an_operators_key_has_a_role_on_the_admin_port_without_tenants() -> None:
    assert Settings(operator_key=("ko",), admin_port=9000).keys_by_tenant() == {}


def test_the_admin_port_is_another_port() -> None:
    with pytest.raises(ValueError, match="admin_port must differ from port"):
        Settings(port=8000, admin_port=8000)
