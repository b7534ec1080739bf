"""Usage of tenants: who may read whose, and that the numbers are those of the answers."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fake_engine import DURATIONS, MODEL
from fastapi.testclient import TestClient

from chunkllama.errors import OverloadedError
from chunkllama.messages import EngineRequest, EngineStats, TenantStats
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.admin_app import create_admin_app
from chunkllama_server.api.common.admission import ChargedEngine, QueueLimits
from chunkllama_server.api.common.fair_pool import FairPool
from chunkllama_server.api.common.response_store import ResponseStore, StoredResponse
from chunkllama_server.api.common.shared_reads import SharedReads
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.config.tenants import TenantQuotas

ENGINE = {
    "blue": TenantStats(
        requests_running=2, requests_waiting=1, chunks_used=4.5, chunks_cached=3, chunks_pinned=1,
        computed_tokens=60, decoded_tokens=15, chunk_seconds=1.5, cached_chunk_seconds=2.5,
        evicted_chunks=2, evicted_tokens=100, evictions_for=3, evictions_of_others=1,
    ),
    "red": TenantStats(computed_tokens=20, decoded_tokens=5, chunks_cached=20),
}  # fmt: skip


@pytest.fixture
def server(start_server):
    quotas = {"blue": TenantQuotas(requests_per_minute=100, weight=2.0)}
    server = start_server(
        api_keys={"blue": "kb", "red": "kr"}, operator_keys=("ko",), quotas=quotas
    )
    server.engine.statistics = EngineStats(steps_total=1, tenants=ENGINE)
    return server


def get(server, path: str, key: str):
    with server.http() as http:
        response = http.get(path, headers={"x-api-key": key})
    assert response.status_code == 200
    return response.json()


def complete(server, key: str, **fields: object):
    body = {"model": MODEL, "prompt": [7] * 20, "max_tokens": 5, **fields}
    return server.post("/v1/completions", body, **{"x-api-key": key})


@pytest.mark.parametrize("path", ["/v1/usage", "/dashboard/tenants", "/metrics"])
def test_tenants_that_ask_again_and_again_leave_the_engine_its_time(
    server, path, monkeypatch
) -> None:
    """A snapshot has a part for each tenant: here it takes a tenth of a second, and then three."""
    now, took, paused = [0.0], [0.1], []

    async def sleep(seconds: float) -> None:
        paused.append(round(seconds, 6))
        now[0] += seconds

    async def stats(**_: bool) -> EngineStats:
        now[0] += took[0]
        return EngineStats(steps_total=2, tenants=ENGINE)

    monkeypatch.setattr(server.engine, "stats", stats)
    context = server.app.state.context
    context.refreshes = SharedReads(lambda: now[0], sleep, most_pause=1.0)
    with server.http() as http:
        for key in ("kb", "kr", "kb", "ko", "ko"):
            assert http.get(path, headers={"x-api-key": key}).status_code == 200
        took[0] = 3.0
        for key in ("kr", "kr"):
            assert http.get(path, headers={"x-api-key": key}).status_code == 200
    assert paused == [0.4, 0.4, 0.2, 1.0], "between those of tenants"


def test_usage_is_the_sum_of_the_answers(server) -> None:
    totals = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
    for fields in (
        {},
        {"n": 3},
        {"best_of": 2},
        {"prompt": [[7] * 20, [7] * 30]},
        {"max_tokens": 1},
    ):
        counted = complete(server, "kb", **fields).json()["usage"]
        totals["prompt_tokens"] += counted["prompt_tokens"]
        totals["completion_tokens"] += counted["completion_tokens"]
        totals["cached_tokens"] += counted["prompt_tokens_details"]["cached_tokens"]
    complete(server, "kr")
    (row,) = get(server, "/v1/usage", "kb")["data"]
    assert row == {
        "tenant": "blue",
        "requests": 6,
        "prompt_tokens": totals["prompt_tokens"],
        "cached_tokens": totals["cached_tokens"],
        "output_tokens": totals["completion_tokens"],
        "computed_tokens": 60,
        "chunk_seconds": 1.5,
        "cached_chunk_seconds": 2.5,
        "queue_seconds": 6 * DURATIONS[0],
        "rejections": {},
        "quotas": {"weight": 2.0, "requests_per_minute": 100},
    }
    assert totals["cached_tokens"] > 0


def test_a_stream_that_is_left_counts_what_it_sent(server) -> None:
    server.engine.delay = 0.01
    body = {"model": MODEL, "prompt": [7] * 20, "max_tokens": 500, "ignore_eos": True}
    with server.http() as http:
        headers = {"x-api-key": "kb"}
        with http.stream(
            "POST", "/v1/completions", json={**body, "stream": True}, headers=headers
        ) as response:
            next(response.iter_lines())
    for _ in range(1000):
        if server.engine.aborted:
            break
        asyncio.run(asyncio.sleep(0.01))
    (row,) = get(server, "/v1/usage", "kb")["data"]
    assert row["prompt_tokens"] == 20 and 1 <= row["output_tokens"] < 500


def test_who_reads_whose_usage(server) -> None:
    names = {
        key: [row["tenant"] for row in get(server, path, key)["data"]]
        for path in ("/v1/usage", "/dashboard/tenants")
        for key in ("kb", "kr", "ko")
    }
    assert {key: sorted(rows) for key, rows in names.items()} == {
        "kb": ["blue"], "kr": ["red"], "ko": ["blue", "red"],
    }  # fmt: skip
    admin = create_admin_app(server.app.state.context)
    with TestClient(admin, base_url="http://127.0.0.1") as client:
        rows = client.get("/v1/usage").json()["data"]
    assert [row["tenant"] for row in rows] == ["blue", "red"]


def test_a_server_without_keys_has_one_tenant(start_server) -> None:
    server = start_server()
    server.chat()
    (row,) = get(server, "/v1/usage", "none")["data"]
    assert (row["tenant"], row["requests"]) == ("", 1)


def test_rejections_by_reason(start_server) -> None:
    quotas = {
        "blue": TenantQuotas(
            requests_per_minute=4, tokens_per_minute=100, allowed_models=("alias",)
        )
    }
    server = start_server(api_keys={"blue": "kb"}, quotas=quotas, clock=lambda: 0.0)
    assert complete(server, "kb").status_code == 403
    assert complete(server, "kb", model="alias", max_tokens=81).status_code == 429
    server.engine.fail_with = OverloadedError("full", 1)
    assert complete(server, "kb", model="alias").status_code == 429
    assert complete(server, "kb", model="alias", n=0).status_code == 400
    assert complete(server, "kb", model="alias").status_code == 429
    (row,) = get(server, "/v1/usage", "kb")["data"]
    assert row["rejections"] == {"model": 1, "tokens": 1, "queue": 1, "requests": 1}
    with server.http() as http:
        text = http.get("/metrics", headers={"x-api-key": "kb"}).text
    assert 'chunkllama_tenant_rejected_total{reason="tokens",tenant="blue"} 1.0' in text


def test_the_dashboard_of_tenants(server) -> None:
    complete(server, "kb")
    body = get(server, "/dashboard/tenants", "ko")
    assert body["chunks_total"] == 64
    red, blue = body["data"]
    assert (red["tenant"], blue["tenant"]) == ("red", "blue"), "most chunks first"
    assert blue["weight"] == 2.0 and red["weight"] == 1.0
    assert (blue["service_share"], red["service_share"]) == (0.75, 0.25)
    assert blue["chunks"] == {"used": 4.5, "cached": 3, "pinned": 1, "pool_share": 7.5 / 64}
    assert blue["evictions"] == {"chunks": 2, "tokens": 100, "for_it": 3, "of_others_for_it": 1}
    assert blue["evicted_tokens_per_prompt_token"] == 5.0
    assert (blue["requests_running"], blue["requests_waiting"]) == (2, 1)
    assert blue["queue_seconds_mean"] == DURATIONS[0]
    assert blue["hit_rate"] == 0.0 and red["hit_rate"] is None
    assert blue["usage"]["prompt_tokens"] == 20


def stored(response_id: str, size: int = 10) -> StoredResponse:
    message = ChatMessage(role="user", content="x" * size)
    return StoredResponse({"id": response_id, "output": []}, [message])  # type: ignore[typeddict-item]


def test_a_tenant_that_stores_much_loses_its_own_responses() -> None:
    store = ResponseStore(10, 1 << 20, 60.0)
    store.put("b", stored("kept"))
    for i in range(50):
        store.put("a", stored(f"{i}"))
    assert store.get("b", "kept") is not None and len(store) == 10
    assert store.get("a", "49") is not None and store.get("a", "40") is None
    store = ResponseStore(1000, 20_000, 60.0)
    store.put("b", stored("kept"))
    for i in range(50):
        store.put("a", stored(f"{i}", 1000))
    assert store.get("b", "kept") is not None and store.num_bytes <= 20_000


def test_stored_responses_of_one_tenant() -> None:
    store = ResponseStore(10, 1 << 20, 60.0)
    for i in range(5):
        store.put("a", stored(f"{i}"), 2)
        store.put("b", stored(f"{i}"), 0)
    assert [store.get("a", f"{i}") is not None for i in range(5)] == [False] * 3 + [True] * 2
    assert all(store.get("b", f"{i}") is None for i in range(5)) and len(store) == 2


class Engine:
    """Never answers."""

    async def generate(self, request: EngineRequest):
        await asyncio.Event().wait()
        yield request


def _num_taken(charged: ChargedEngine) -> int:
    """Send requests of one token and tenant until one is refused; returns how many are taken."""

    async def run(number: int) -> None:
        request = EngineRequest(
            request_id=f"r{number}", prompt_token_ids=[1], tenant="a", sampling=SamplingParams()
        )
        async for _ in charged.generate(request):
            pass

    async def main() -> int:
        tasks = []
        while not tasks or not tasks[-1].done():
            tasks.append(asyncio.create_task(run(len(tasks))))
            await asyncio.sleep(0)
        assert isinstance(tasks.pop().exception(), OverloadedError)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    return asyncio.run(main())


def test_the_engines_own_limit_of_a_tenant_replaces_the_free_places() -> None:
    assert _num_taken(ChargedEngine(Engine(), 8, 40)) == 28
    assert _num_taken(ChargedEngine(Engine(), 8, 40, has_own_limit=lambda _: True)) == 48


def test_a_small_share_of_tokens_still_lets_one_request_wait() -> None:
    limits = QueueLimits(tokens=200, chunks=200)
    assert _num_taken(ChargedEngine(Engine(), 8, 40, limits, lambda _: 0.004)) == 1


def test_a_tenants_requests_with_many_choices_leave_places_to_others() -> None:
    async def main(share: float | None) -> int:
        charged = ChargedEngine(Engine(), 8, 40, None, lambda _: share)
        tasks = []

        async def run(tenant: str, n: int) -> None:
            request = EngineRequest(
                request_id=f"r{len(tasks)}", prompt_token_ids=[1], tenant=tenant,
                sampling=SamplingParams(n=n, seed=1),
            )  # fmt: skip
            async for _ in charged.generate(request):
                pass

        taken = 0
        while True:
            tasks.append(asyncio.create_task(run("a", 4)))
            await asyncio.sleep(0)
            if tasks[-1].done():
                with pytest.raises(OverloadedError, match="this API key"):
                    tasks.pop().result()
                break
            taken += 4
        tasks.append(asyncio.create_task(run("b", 4)))
        await asyncio.sleep(0)
        assert not tasks[-1].done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert charged.num_sequences == 0 and not charged._by_tenant
        return taken

    assert asyncio.run(main(None)) == 28  # 8 and half of 40
    assert asyncio.run(main(0.1)) == 12


def test_tokenizer_time_is_divided_by_shares() -> None:
    """A clock that each piece of work turns by a second; the order of the pieces is exact."""
    now = [0.0]
    order: list[str] = []

    async def main() -> None:
        shares = {"a": 1.0, "b": 1.0, "slow": 0.5}
        pool = FairPool(1, "t", shares.__getitem__, lambda: now[0])

        def work(tenant: str) -> None:
            now[0] += 1.0
            order.append(tenant)

        tasks = [
            asyncio.create_task(pool.run(tenant, lambda tenant=tenant: work(tenant)))
            for tenant in [*"aaaaaa", *["slow"] * 6, *"bbb"]
        ]
        cancelled = tasks[5]
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.close()

    asyncio.run(main())
    assert order[:9].count("a") == 4 and order[:9].count("b") == 3 and order.count("a") == 5
    assert order[-4:] == ["slow"] * 4


def test_an_error_of_the_work_reaches_its_caller() -> None:
    async def main() -> None:
        pool = FairPool(1, "t", lambda _: 1.0)
        with pytest.raises(ZeroDivisionError):
            await pool.run("a", lambda: 1 // 0)
        assert await pool.run("a", lambda: 7) == 7
        pool.close()

    asyncio.run(main())


def test_cancelled_work_is_not_kept_behind_overdue_work() -> None:
    may_end = threading.Event()

    async def main() -> None:
        pool = FairPool(1, "t", lambda _: 1.0, num_spare=1, patience=0.0)
        first = asyncio.create_task(pool.run("a", lambda: may_end.wait(60)))
        async with asyncio.timeout(60):
            while not pool.num_overdue("a"):
                await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(pool.run("a", lambda: None)) for _ in range(3)]
        await asyncio.sleep(0)
        assert len(pool._queues["a"]) == 3
        for number, task in enumerate(waiting, start=1):
            task.cancel()
            await asyncio.wait([task])
            assert len(pool._queues.get("a", ())) == 3 - number
        assert not pool._queues
        may_end.set()
        assert await first
        assert await pool.run("a", lambda: 7) == 7
        pool.close()

    asyncio.run(main())
