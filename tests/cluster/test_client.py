"""A cluster's client over channels to fake replicas: routing, failover, refusals."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from fake_replicas import INFO, Fixture, request, run, settle

from chunkllama.cluster.messages import Beat, Ended
from chunkllama.errors import EngineDeadError, OverloadedError, RequestFailedError
from chunkllama.messages import AbortRequest, ChoiceDelta, EngineRequest, TokenDelta


def test_a_request_continues_where_its_replica_left_it() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(2)
        first = f.home("one")
        first.die()
        (again,) = [m for m in f.home("one").got if isinstance(m, EngineRequest)]
        assert again.delivered == [[1000, 1001]] and again.is_replay
        await f.step(4)
        assert await task == [1000 + i for i in range(6)]
        assert f.client.failovers == {"death": 1} and f.client.restarts == 1
        assert f.client.replayed_tokens == 132
        assert f.client.routing.counts["retry"] == 1
        f.client.routing.check_invariants()

    run(scenario)


def test_late_tokens_of_a_lost_replica_are_dropped() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(2)
        first = f.home("one")
        first.die()
        late = ChoiceDelta(index=0, token_ids=[1])
        f.client.receive(first, [TokenDelta(request_id="one", choices=[late])])
        await f.step(4)
        assert await task == [1000 + i for i in range(6)]

    run(scenario)


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_finished_request_is_left_after_its_replica_has_ended(is_closed: bool) -> None:
    """By a client that has gone, or by a stop string in its last tokens."""

    async def scenario(f: Fixture) -> None:
        stream = f.client.generate(request("one", max_tokens=2))
        begun = asyncio.ensure_future(anext(stream))
        await f.step(2)  # the last token waits
        home = next(r for r in f.replicas.values() if "one" in r.done)
        home.die()
        assert (await begun).choices[0].token_ids == [1000]
        if not is_closed:
            assert (await anext(stream)).choices[0].token_ids == [1001]
            await f.client.abort("one", 0)
        await stream.aclose()  # type: ignore[attr-defined]
        assert not f.client._streams and not f.client._routes
        f.client.routing.check_invariants()

    run(scenario)


def test_without_replicas_requests_wait_for_one() -> None:
    async def scenario(f: Fixture) -> None:
        live, late = f.begin(request("live")), None
        await f.step(2)
        for replica in f.replicas.values():
            replica.die(set())
        assert f.states == [True] and f.client.is_ready
        late = f.begin(request("late"))
        await settle()
        dropped = f.begin(request("dropped"))
        await settle()
        dropped.cancel()
        await settle()
        made = f.add("c")
        assert f.states == [True, False]
        assert set(made.live) == {"live", "late"}
        await f.step(6)
        assert await live == await late == [1000 + i for i in range(6)]

    run(scenario)


def test_a_request_that_ends_replicas_is_failed_and_the_others_go_on() -> None:
    async def scenario(f: Fixture) -> None:
        names = ["x", "poison", "y", "z"]
        tasks = {name: f.begin(request(name, max_tokens=12)) for name in names}
        await f.step(2)
        deaths = 0
        while not tasks["poison"].done():
            home = f.home("poison")
            del f.replicas[home.name]
            f.add(f"c{deaths}")
            home.die(set(home.live))
            deaths += 1
            for _ in range(8):  # each trial of another request takes two steps
                await settle()
                if any("poison" in each.live for each in f.replicas.values()):
                    break
                await f.step()
        assert deaths == 3, "two failovers, then the end"
        with pytest.raises(RequestFailedError) as failed:
            await tasks["poison"]
        assert failed.value.code == "engine_poison_request"
        await f.step(12)
        for name in ("x", "y", "z"):
            assert await tasks[name] == [1000 + i for i in range(12)]
        f.client.routing.check_invariants()

    run(scenario)


def test_requests_outside_the_unfinished_step_are_not_counted() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("waiting"))
        await settle()
        for number in range(5):
            home = f.home("waiting")
            del f.replicas[home.name]
            f.add(f"c{number}")
            home.live.clear()
            f.client.receive(home, [Ended(reason="killed", running=["other"])])
        await f.step(6)
        assert await task == [1000 + i for i in range(6)]

    run(scenario)


def test_a_long_answer_survives_many_replicas() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("long", max_tokens=400))
        for number in range(5):
            await f.step(70)
            home = f.home("long")
            del f.replicas[home.name]
            f.add(f"c{number}")
            home.die()
        await f.step(50)
        assert await task == [1000 + i for i in range(400)]

    run(scenario)


def test_a_full_replica_passes_a_request_on() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        home = f.home("one")
        home.is_full = 5
        other = f.begin(request("two"))
        await settle()
        assert f.home("two") is not home
        await f.step(6)
        await task
        assert await other == [1000 + i for i in range(6)]

    run(scenario)


def test_when_all_are_full_the_shortest_retry_after_is_told() -> None:
    async def scenario(f: Fixture) -> None:
        for replica, seconds in zip(f.replicas.values(), (9, 4), strict=True):
            replica.is_full = seconds
        with pytest.raises(OverloadedError) as refused:
            await f.begin(request("one"))
        assert refused.value.retry_after == 4
        assert all(f.client.routing.load(name) == 0 for name in f.replicas)

    run(scenario)


def test_a_draining_replica_gets_no_new_requests_and_keeps_its_own() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        home = f.home("one")
        f.client.receive(home, [Beat(is_draining=True)])
        other = f.begin(request("two"))
        await settle()
        assert f.home("two") is not home
        assert f.client.replica_states() == {"running": 1, "draining": 1}
        await f.step(6)
        await asyncio.gather(task, other)
        f.client.receive(home, [Ended(reason="drained")])
        assert f.client.restarts == 0 and f.client.replicas != ["a", "b"]

    run(scenario)


def test_what_a_drained_replica_leaves_goes_on_and_is_not_counted() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        for number in range(4):
            home = f.home("one")
            f.client.receive(home, [Beat(is_draining=True)])
            del f.replicas[home.name]
            f.add(f"c{number}")
            home.die()
        await f.step(5)
        assert await task == [1000 + i for i in range(6)]
        assert f.client.failovers == {"drain": 4}

    run(scenario)


def test_an_abort_goes_to_the_replica_that_has_the_request() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        home = f.home("one")
        task.cancel()
        await settle()
        assert isinstance(home.got[-1], AbortRequest)
        assert not any(
            isinstance(m, AbortRequest) for m in f.replicas["ab".replace(home.name, "")].got
        )
        assert f.client.routing.load(home.name) == 0

    run(scenario)


def test_limits_are_those_that_every_replica_in_use_keeps() -> None:
    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        newer = msgspec.structs.replace(INFO, max_request_tokens=9000, num_chunks=50, backend="new")
        f.add("c", newer)
        assert f.client.info == msgspec.structs.replace(newer, max_request_tokens=4096)
        a.die()
        assert f.client.info.max_request_tokens == 4096
        f.client.receive(b, [Beat(is_draining=True)])
        assert f.client.info == newer
        f.replicas["c"].die()
        b.die()
        assert f.client.info == newer, "until there is a replica again"

    run(scenario)


def test_closing_ends_live_requests() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        await f.client.close()
        with pytest.raises(EngineDeadError):
            await task

    run(scenario)
