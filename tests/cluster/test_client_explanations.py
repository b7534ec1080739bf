"""Why a match ended on one replica of a cluster, as the caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import fake_replicas
import msgspec
import pytest
from fake_replicas import FakeReplica, Fixture, request, settle

from chunkllama.adapter_messages import AdapterInfo
from chunkllama.cluster.messages import Beat
from chunkllama.cluster.prefix_keys import prefix_keys
from chunkllama.messages import (
    CacheExplanation,
    CacheReason,
    ChoiceDelta,
    CommandReply,
    EngineStats,
    TokenDelta,
)

PROMPT = [1] * 130  # two chunks and a rest
NAMESPACE, TENANT = "private", "t"


def run(scenario: Callable[[Fixture], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario where each tenant has a namespace of its own."""

    async def isolated(f: Fixture) -> None:
        f.client.are_isolated = True
        await scenario(f)

    fake_replicas.run(isolated)


def said(reason: CacheReason = "unknown", matched: int = 0, known: int = 0) -> CacheExplanation:
    return CacheExplanation(num_matched_tokens=matched, num_known_tokens=known, reason=reason)


def has(f: Fixture, replica: FakeReplica, num_chunks: int, *namespaces: str) -> None:
    """Let a replica report the first chunks of the prompt as cached."""
    each = [prefix_keys(name, PROMPT, 64)[:num_chunks] for name in namespaces or (NAMESPACE,)]
    f.client.receive(replica, [Beat(heads=[*map(list, zip(*each, strict=True)), []])])


def is_busy(f: Fixture, replica: FakeReplica) -> None:
    f.client.receive(replica, [Beat(stats=EngineStats(requests_running=60))])


async def explained(f: Fixture, by: CacheExplanation, **options: Any) -> CacheExplanation:
    """Ask for the explanation; the replica that is asked answers ``by``."""
    for replica in f.replicas.values():
        replica.reply = CommandReply(command_id=0, explanation=msgspec.structs.replace(by))
    given = {"namespace": NAMESPACE, "tenant": TENANT, **options}
    return await f.client.explain(PROMPT, **given)


async def answered(f: Fixture, by: CacheExplanation) -> CacheExplanation | None:
    """Send the prompt; its first token carries the explanation."""
    wanted = msgspec.structs.replace(
        request("r"), explain=True, namespace=NAMESPACE, tenant=TENANT, prompt_token_ids=PROMPT
    )
    stream = f.client.generate(wanted)
    task = asyncio.ensure_future(anext(stream))
    await settle()
    home = f.home("r")
    choice = ChoiceDelta(index=0, token_ids=[5])
    f.client.receive(home, [TokenDelta(request_id="r", choices=[choice], explanation=by)])
    delta = await task
    await stream.aclose()
    return delta.explanation


@pytest.mark.parametrize("ask", [explained, answered])
def test_the_rest_is_on_a_replica_that_is_too_busy(ask: Any) -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 2)
        is_busy(f, a)
        assert await ask(f, said()) == said("another_replica", 0, 128)

    run(scenario)


@pytest.mark.parametrize("ask", [explained, answered])
def test_the_replica_that_has_most_is_asked_and_its_reason_is_given(ask: Any) -> None:
    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        has(f, a, 1)
        has(f, b, 2)
        assert await ask(f, said("never_seen", 128, 128)) == said("never_seen", 128, 128)

    run(scenario)


@pytest.mark.parametrize("reason", ["unknown", "never_seen", "diverged", "another_namespace"])
def test_what_a_replica_has_not_seen_may_be_on_another(reason: CacheReason) -> None:
    async def scenario(f: Fixture) -> None:
        a, b = f.replicas.values()
        has(f, a, 2)
        has(f, b, 1)
        is_busy(f, a)
        assert await explained(f, said(reason, 64, 64)) == said("another_replica", 64, 128)

    run(scenario)


@pytest.mark.parametrize(
    "reason", ["complete", "evicted", "expired", "dropped", "not_stored", "in_progress", "no_room"]
)
def test_what_a_replica_knows_of_its_own_cache_is_said(reason: CacheReason) -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 2)
        is_busy(f, a)
        assert await explained(f, said(reason, 0, 128)) == said(reason, 0, 128)

    run(scenario)


def test_a_replica_that_has_less_explains_nothing() -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 1)
        is_busy(f, a)
        assert await explained(f, said("unknown", 64)) == said("unknown", 64)

    run(scenario)


def test_what_is_gone_with_its_replica_is_not_known() -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 2)
        a.die()
        assert await explained(f, said()) == said()

    run(scenario)


def test_nothing_is_said_of_what_other_tenants_have_sent() -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 2, "", "of another tenant")
        is_busy(f, a)
        assert await explained(f, said()) == said()
        assert await explained(f, said(), namespace="") == said(), "shared by several tenants"
        assert (await explained(f, said(), namespace="", tenant="")).reason == "another_replica"
        f.client.are_isolated = False  # then a salt makes a namespace of all tenants
        assert await explained(f, said()) == said()

    run(scenario)


def test_prefixes_are_not_told_apart_by_adapter() -> None:
    async def scenario(f: Fixture) -> None:
        a, _ = f.replicas.values()
        has(f, a, 2)
        is_busy(f, a)
        assert await explained(f, said(), adapter="x") == said()
        f.client.adapters["x"] = AdapterInfo(
            name="x", folder="", rank=8, num_bytes=1, is_activated=False, digest=""
        )
        assert await explained(f, said()) == said()

    run(scenario)
