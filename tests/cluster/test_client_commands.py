"""A cluster's client over channels to fake replicas: commands to all of them, and statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from fake_replicas import FakeReplica, Fixture, request, run, settle

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import CacheCommand, EndedPin, LoadPack, PackInfo, PinInfo
from chunkllama.cluster.merge import tag_chunk
from chunkllama.cluster.messages import REPEATED, Beat, Dropped, Ended, Spent
from chunkllama.errors import EngineDeadError
from chunkllama.messages import CommandReply, EngineStats, SetTenants, ToEngine
from chunkllama_server.metrics.engine_names import ENGINE_COUNTERS, ENGINE_GAUGES


def test_statistics_are_summed_and_keep_what_is_gone() -> None:
    async def scenario(f: Fixture) -> None:
        pushed: list[EngineStats] = []
        f.client.on_stats = pushed.append
        a, b = f.replicas.values()
        f.client.receive(a, [Beat(stats=EngineStats(steps_total=3, requests_running=2))])
        f.client.receive(b, [Beat(stats=EngineStats(steps_total=4, requests_running=1))])
        assert (pushed[-1].steps_total, pushed[-1].requests_running) == (7, 3)
        assert pushed[-1].is_pushed
        f.client.receive(a, [Beat(stats=EngineStats(steps_total=2))])  # overtaken by a newer one
        assert pushed[-1].steps_total == 7
        a.die()
        total = await f.client.stats()
        assert (total.steps_total, total.requests_running) == (7, 1)
        assert (await f.client.stats(include_tenants=True)).steps_total == 10
        late = Beat(stats=EngineStats(steps_total=9))
        f.client.receive(b, [Ended(reason="killed"), late])
        assert (await f.client.stats()).steps_total == 10

    run(scenario)


def test_gauges_of_a_replica_that_has_ended_are_not_summed() -> None:
    """All numbers of a snapshot that go up and down, however many there are."""
    counters = {name for name in ENGINE_COUNTERS if name.endswith("_total")}
    gauges = {*ENGINE_GAUGES, "chunks_free", "chunks_cached"} - {"invariant_violations"}

    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        numbers = dict.fromkeys({*counters, *gauges, "invariant_violations"}, 1)
        for replica in (a, b):
            f.client.receive(replica, [Beat(stats=EngineStats(**numbers))])
        a.die()
        total = await f.client.stats()
        assert {name: getattr(total, name) for name in numbers} == {
            name: 1 if name in gauges else 2 for name in numbers
        }

    run(scenario)


def test_a_replica_that_hangs_keeps_no_statistics_of_others_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chunkllama.cluster.commands._STATS_SECONDS", 0.01)

    async def hang(include_tree: bool, include_tenants: bool) -> EngineStats:
        await asyncio.Event().wait()
        raise AssertionError

    async def dead(include_tree: bool, include_tenants: bool) -> EngineStats:
        raise EngineDeadError("killed")

    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        f.add("c")
        f.client.receive(a, [Beat(stats=EngineStats(steps_total=3))])
        a.stats, b.stats = hang, dead  # type: ignore[method-assign]
        assert (await f.client.stats(include_tenants=True)).steps_total == 3 + 7

    run(scenario)


@pytest.mark.parametrize("ends", ["lost", "closed"])
@pytest.mark.parametrize("what", ["load", "drop", "explain", "public"])
def test_a_command_waits_for_a_replica_that_hangs_until_it_is_lost(what: str, ends: str) -> None:
    async def scenario(f: Fixture) -> None:
        hangs = asyncio.Event().wait
        a, b = f.replicas.values()
        for replica in (a, b):  # either may be the one that is asked
            replica.ask = replica.compute = lambda _: hangs()  # type: ignore[method-assign]
        (number, *_) = f.client._channels()
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "load": lambda: f.client.load_adapter("x", "/x"),
            "drop": lambda: f.client.cache_command("drop_pin", chunk_id=tag_chunk(number, 1)),
            "explain": lambda: f.client.explain([1] * 70),
            "public": lambda: f.client.keep_public(request("public")),
        }
        call = asyncio.create_task(calls[what]())
        await settle()
        assert not call.done()
        if ends == "closed":
            await f.client.close()
        for replica in (a, b) if ends == "lost" else ():
            f.client.lose(replica, "hangs", None, hung=True)
        with pytest.raises(EngineDeadError):
            await call

    run(scenario)


def test_what_all_replicas_have_reaches_later_ones() -> None:
    async def scenario(f: Fixture) -> None:
        info = AdapterInfo(
            name="x", folder="/x", rank=1, num_bytes=1, is_activated=False, digest="d"
        )
        for replica in f.replicas.values():
            replica.reply = CommandReply(command_id=0, adapter=info)
        assert await f.client.load_adapter("x", "/x") == info
        await f.client.keep_public(request("public"))
        f.client.set_tenants(SetTenants())
        pack = LoadPack(path="/p", namespaces={}, template="")
        f.client.use_file(pack)
        assert [len(r.computed) for r in f.replicas.values()] == [1, 1]
        late = FakeReplica(f.client, "late")
        late.reply = CommandReply(command_id=0, adapter=info)
        await f.client.prepare(late)
        f.client.join(late)
        assert [type(c) for c in late.commands] == [LoadAdapter]
        assert [r.request_id for r in late.computed] == ["public"]
        assert late.got == [SetTenants()] and late.files == [pack]
        assert all(pack in replica.got for name, replica in f.replicas.items())

    run(scenario)


def test_an_adapter_that_is_unloaded_while_a_replica_joins_is_unloaded_there() -> None:
    async def scenario(f: Fixture) -> None:
        infos = {
            name: AdapterInfo(
                name=name, folder="/", rank=1, num_bytes=1, is_activated=False, digest="d"
            )
            for name in ("x", "y")
        }
        f.client.adapters.update(infos)
        late = FakeReplica(f.client, "late")

        async def ask(command: ToEngine) -> CommandReply:
            late.commands.append(command)
            if isinstance(command, UnloadAdapter):
                return CommandReply(command_id=0)
            assert isinstance(command, LoadAdapter)
            if command.name == "y":
                await f.client.unload_adapter("x")
            return CommandReply(command_id=0, adapter=infos[command.name])

        late.ask = ask  # type: ignore[method-assign]
        await f.client.prepare(late)
        told = [(type(c), c.name) for c in late.commands]  # type: ignore[union-attr]
        assert told == [(LoadAdapter, "x"), (LoadAdapter, "y"), (UnloadAdapter, "x")]

    run(scenario)


@pytest.mark.parametrize("other", [False, True])
def test_a_dropped_tenant_is_not_brought_back_by_a_replica_that_joins(other: bool) -> None:
    """Dropped here or through another front end, while this one brings the replica its packs."""
    drop = CacheCommand(command_id=REPEATED, action="drop_tenant", tenant="alice")

    async def scenario(f: Fixture) -> None:
        namespaces = {"": "", "alice": "a", "bob": "b"}
        f.client.use_file(LoadPack(path="/p", namespaces=namespaces, template=""))
        a, b = f.replicas.values()
        late = FakeReplica(f.client, "late")

        async def use_files(commands: list[LoadPack]) -> None:
            late.files += commands
            if len(late.files) > 1:
                return
            if other:
                f.client.receive(a, [Dropped(tenant="alice")])
            else:
                await f.client.cache_command("drop_tenant", tenant="alice")

        late.use_files = use_files  # type: ignore[method-assign]
        await f.client.prepare(late)
        f.client.join(late)
        assert [pack.namespaces for pack in late.files] == [namespaces, {"": "", "bob": "b"}]
        assert late.commands == [drop]
        f.client.receive(b, [Dropped(tenant="alice")])  # each replica says so
        assert [each.got.count(drop) for each in (a, b, late)] == [other, other, 0]

    run(scenario)


@pytest.mark.parametrize("other", [False, True])
def test_the_echo_of_a_drop_undoes_no_newer_pack(other: bool) -> None:
    """Each replica reports a drop, the last one perhaps after new requests of the tenant."""

    async def scenario(f: Fixture) -> None:
        old = LoadPack(path="/p", namespaces={"": "", "alice": "a"}, template="")
        f.client.use_file(old)
        a, b = f.replicas.values()
        echo = Dropped(tenant="alice", drop_id=7)
        if other:
            f.client.receive(a, [echo])
        else:
            await f.client.cache_command("drop_tenant", tenant="alice")
            ids = {c.command_id for c in (*a.commands, *b.commands) if isinstance(c, CacheCommand)}
            echo = Dropped(tenant="alice", drop_id=ids.pop())
            assert echo.drop_id > 0 and not ids
        new = LoadPack(path="/q", namespaces={"": "", "alice": "a"}, template="")
        f.client.use_file(new)
        before = [len(each.got) for each in (a, b)]
        f.client.receive(b, [echo])
        assert [len(each.got) for each in (a, b)] == before
        late = FakeReplica(f.client, "late")
        await f.client.prepare(late)
        given = {pack.path: pack.namespaces for pack in late.files}
        assert given == {"/p": {"": ""}, "/q": new.namespaces}
        f.client.receive(b, [Dropped(tenant="alice", drop_id=8)])  # another drop counts
        assert [len(each.got) for each in (a, b)] == [count + 1 for count in before]

    run(scenario)


def test_a_pin_that_is_ended_through_another_front_end_is_not_made_again() -> None:
    async def scenario(f: Fixture) -> None:
        pinned = msgspec.structs.replace(request("one"), tenant="t", pin_seconds=600.0)
        task = f.begin(pinned)
        await f.step(2)
        home, prompt = f.home("one"), pinned.prompt_token_ids
        ended = EndedPin(tenant="t", namespace="", token_ids=prompt, askers=[(len(prompt), "")])
        f.client.receive(home, [Dropped(ended_pins=[ended])])
        home.die()
        assert f.home("one").live["one"].pin_seconds == 0
        await f.step(4)
        await task

    run(scenario)


@pytest.mark.parametrize("chunk_id", [-1, 3])
def test_a_pin_that_an_operator_ends_is_not_made_again_by_a_failover(chunk_id: int) -> None:
    async def scenario(f: Fixture) -> None:
        pinned = msgspec.structs.replace(request("one"), tenant="t", pin_seconds=600.0)
        task = f.begin(pinned)
        await f.step(2)
        home = f.home("one")
        (number,) = [n for n, channel in f.client._channels().items() if channel is home]
        prompt = pinned.prompt_token_ids
        ended = EndedPin(tenant="t", namespace="", token_ids=prompt, askers=[(len(prompt), "")])
        home.reply = CommandReply(command_id=0, ended_pins=[ended])
        tagged = tag_chunk(number, chunk_id)
        await f.client.cache_command("drop_pin", chunk_id=tagged)
        home.die()
        assert f.home("one").live["one"].pin_seconds == 0
        await f.step(4)
        await task

    run(scenario)


def test_front_ends_hear_of_what_tenants_spend_at_others() -> None:
    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        spent = {"t": (2.0, 40.0)}
        f.client.take_spent = lambda: spent
        heard: list[dict[str, tuple[float, float]]] = []
        f.client.on_spent = heard.append
        f.client.receive(a, [Beat(stats=EngineStats())])
        f.client.receive(b, [Beat(stats=EngineStats())])
        assert [each for each in a.got if isinstance(each, Spent)] == [Spent(tenants=spent)]
        assert not any(isinstance(each, Spent) for each in b.got), "once a second"
        f.client.receive(b, [Spent(tenants={"t": (1.0, 3.0)})])
        assert heard == [{"t": (1.0, 3.0)}]

    run(scenario)


def test_replies_of_all_replicas_are_one() -> None:
    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        pin = PinInfo(chunk_id=3, tenant="t", num_tokens=1, num_chunks=1, seconds_left=1.0)
        a.reply = CommandReply(command_id=0, pins=[pin], packs=[PackInfo(name="p", state="loaded")])
        b.reply = CommandReply(command_id=0, pins=[pin], packs=[PackInfo(name="p")])
        reply = await f.client.cache_command("pins")
        assert len({pin.chunk_id for pin in reply.pins}) == 2
        assert [pack.state for pack in reply.packs] == ["loading"]
        b.reply = CommandReply(command_id=0, found=True)
        await f.client.cache_command("drop_pin", chunk_id=reply.pins[1].chunk_id)
        assert [len(a.commands), len(b.commands)] == [1, 2]
        assert b.commands[-1].chunk_id == 3  # type: ignore[union-attr]

    run(scenario)
