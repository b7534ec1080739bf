"""A cluster's client over channels to fake replicas: routing, failover, refusals, commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import EndedPin, LoadPack, PackInfo, PinInfo
from chunkllama.cluster.client import ClusterEngineClient
from chunkllama.cluster.merge import tag_chunk
from chunkllama.cluster.messages import Beat, Ended
from chunkllama.cluster.routing import PrefixRouting
from chunkllama.errors import EngineDeadError, OverloadedError, RequestFailedError
from chunkllama.messages import (
    AbortRequest,
    ChoiceDelta,
    CommandReply,
    EngineErrorInfo,
    EngineReady,
    EngineRequest,
    EngineStats,
    SetTenants,
    ToEngine,
    TokenDelta,
)
from chunkllama.sampling_params import SamplingParams

INFO = EngineReady(
    model_name="fake",
    vocab_size=1000,
    max_model_len=4096,
    eos_token_ids=[],
    num_chunks=100,
    chunk_size=64,
    max_request_tokens=4096,
    device="cpu",
    backend="fake",
)


class FakeReplica:
    """A channel whose replica answers token ``i`` with ``1000 + i``, when told to step."""

    def __init__(self, client: ClusterEngineClient, name: str) -> None:
        self.name, self.info, self.lost = name, INFO, asyncio.Event()
        self.client = client
        self.got: list[ToEngine] = []
        self.live: dict[str, EngineRequest] = {}
        self.done: dict[str, int] = {}
        self.is_full = 0
        self.commands: list[ToEngine] = []
        self.reply = CommandReply(command_id=0)
        self.computed: list[EngineRequest] = []
        self.files: list[LoadPack] = []

    def send(self, messages: list[ToEngine]) -> None:
        self.got += messages
        for message in messages:
            if isinstance(message, EngineRequest):
                self._take(message)
            elif isinstance(message, AbortRequest) and message.index is None:
                self.live.pop(message.request_id, None)

    def _take(self, request: EngineRequest) -> None:
        if self.is_full and not request.is_replay:
            info = EngineErrorInfo(kind="overloaded", message="full", retry_after=self.is_full)
            failed = TokenDelta(request_id=request.request_id, choices=[], error=info)
            asyncio.get_running_loop().call_soon(self.client.receive, self, [failed])
            return
        self.live[request.request_id] = request
        self.done[request.request_id] = len(request.delivered[0]) if request.delivered else 0

    def step(self) -> None:
        """Give each request its next token."""
        items = []
        for name, request in list(self.live.items()):
            done = self.done[name]
            self.done[name] += 1
            is_last = done + 1 == request.sampling.max_tokens
            choice = ChoiceDelta(
                index=0, token_ids=[1000 + done], finish_reason="length" if is_last else None
            )
            items.append(TokenDelta(request_id=name, choices=[choice]))
            if is_last:
                del self.live[name]
        self.client.receive(self, items)

    def die(self, running: set[str] | None = None) -> None:
        self.live.clear()
        self.client.lose(self, "killed", running)

    async def stats(self, include_tree: bool, include_tenants: bool) -> EngineStats:
        return EngineStats(requests_running=len(self.live), steps_total=7)

    async def ask(self, command: ToEngine) -> CommandReply:
        self.commands.append(command)
        return self.reply

    async def use_files(self, commands: list[LoadPack]) -> None:
        self.files += commands

    async def compute(self, request: EngineRequest) -> TokenDelta:
        self.computed.append(request)
        return TokenDelta(request_id=request.request_id, choices=[])


def request(name: str, prompt: int = 1, max_tokens: int = 6) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1)
    return EngineRequest(request_id=name, prompt_token_ids=[prompt] * 130, sampling=sampling)


class Fixture:
    """A client with replicas a and b, and requests that collect their tokens."""

    def __init__(self, max_failovers: int = 2) -> None:
        self.client = ClusterEngineClient(PrefixRouting(), max_failovers)
        self.replicas: dict[str, FakeReplica] = {}
        self.states: list[bool] = []
        for name in ("a", "b"):
            self.add(name)
        self.client.on_restarting = self.states.append
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, info: EngineReady = INFO) -> FakeReplica:
        made = self.replicas[name] = FakeReplica(self.client, name)
        made.info = info
        self.client.join(made)
        return made

    def begin(self, wanted: EngineRequest) -> asyncio.Task[list[int]]:
        got = self.tokens[wanted.request_id] = []

        async def run() -> list[int]:
            async for delta in self.client.generate(wanted):
                got.extend(token for choice in delta.choices for token in choice.token_ids)
            return got

        return asyncio.create_task(run())

    def home(self, name: str) -> FakeReplica:
        (found,) = [each for each in self.replicas.values() if name in each.live]
        return found

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            await settle()
            for replica in list(self.replicas.values()):
                replica.step()
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Callable[[Fixture], Coroutine[Any, Any, None]], **options: int) -> None:
    async def whole() -> None:
        await scenario(Fixture(**options))

    asyncio.run(whole())


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


def test_a_replica_that_hangs_keeps_no_statistics_of_others_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chunkllama.cluster.client._STATS_SECONDS", 0.01)

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


def test_closing_ends_live_requests() -> None:
    async def scenario(f: Fixture) -> None:
        task = f.begin(request("one"))
        await f.step(1)
        await f.client.close()
        with pytest.raises(EngineDeadError):
            await task

    run(scenario)
