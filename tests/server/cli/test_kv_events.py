"""Events of the cache over ZeroMQ: a subscriber that applies them knows what is stored."""

from __future__ import annotations

import asyncio
import socket
import time

import httpx
import msgspec
import pytest

from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import Settings, load_settings
from chunkllama_server.metrics.kv_events import publish_kv_events

zmq = pytest.importorskip("zmq", reason="needs pyzmq: pip install chunkllama[kv-events]")

TEXT = "one two three four five six seven eight nine ten eleven twelve "


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """As vLLM's subscribers decode it."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Event(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    pass


class BlockStored(Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(Event):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class Subscriber:
    """Applies events; fails when a number is left out or a parent is missing."""

    def __init__(self, context, endpoint: str) -> None:
        self.socket = context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self.socket.setsockopt(zmq.RCVTIMEO, 120_000)
        self.socket.connect(endpoint)
        self.blocks: dict[int, BlockStored] = {}
        self.number: int | None = None
        self.is_cleared = False

    def read(self) -> list:
        topic, number, payload = self.socket.recv_multipart()
        assert topic == b"kv@me@tiny"
        if self.number is not None:
            assert int.from_bytes(number, "big") == self.number + 1
        self.number = int.from_bytes(number, "big")
        batch = msgspec.msgpack.decode(payload, type=EventBatch)
        assert abs(batch.ts - time.time()) < 3600 and batch.data_parallel_rank == 0
        for event in batch.events:
            match event:
                case AllBlocksCleared():
                    self.is_cleared = True
                    self.blocks.clear()
                case BlockStored():
                    assert event.block_size == len(event.token_ids) == 64
                    parent = event.parent_block_hash
                    assert parent is None or parent in self.blocks
                    (key,) = event.block_hashes
                    assert key not in self.blocks
                    self.blocks[key] = event
                case BlockRemoved():
                    (key,) = event.block_hashes
                    del self.blocks[key]
        return batch.events

    def read_until(self, condition) -> None:
        while not condition():
            self.read()

    def prompts(self) -> list[tuple[tuple[int, ...], str]]:
        """Tokens from the root to each block's end, and its namespace; shortest first."""
        found = []
        for block in self.blocks.values():
            tokens: tuple[int, ...] = ()
            step: BlockStored | None = block
            while step is not None:
                tokens = (*step.token_ids, *tokens)
                parent = step.parent_block_hash
                step = None if parent is None else self.blocks[parent]
            extra = block.extra_keys
            found.append((tokens, extra[0][0] if extra and extra[0] else ""))
        return sorted(found, key=lambda item: (len(item[0]), item[1]))


@pytest.fixture(scope="module")
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture(scope="module")
def served(start, tmp_path_factory):
    endpoint = f"ipc://{tmp_path_factory.mktemp('events')}/socket"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start(
        *("--kv-events-endpoint", endpoint, "--kv-events-topic", "kv@me@tiny"),
        *("--api-key", "red:kr", "--api-key", "blue:kb", "--num-chunks", 10),
        *("--admin-port", port),
    )
    server.endpoint, server.admin = endpoint, f"http://127.0.0.1:{port}"
    return server


def complete(served, key: str, prompt: str) -> list[int]:
    """Send a prompt; returns its tokens."""
    with httpx.Client(base_url=served.url, headers={"x-api-key": key}, timeout=120) as http:
        body = {"prompt": prompt, "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 200
        rendered = http.post("/v1/completions/render", json={"prompt": prompt}).json()
    return rendered[0]["token_ids"]


def test_subscribers_know_the_stored_chunks_of_each_tenant(served, context) -> None:
    first = Subscriber(context, served.endpoint)
    first.read_until(lambda: first.is_cleared)
    assert not first.blocks
    prompt = (TEXT * 4)[:150]
    tokens = complete(served, "kr", prompt)
    first.read_until(lambda: len(first.blocks) == 2)
    red = first.prompts()
    assert [found for found, _ in red] == [tuple(tokens[:64]), tuple(tokens[:128])]
    complete(served, "kb", prompt)
    first.read_until(lambda: len(first.blocks) == 4)
    names = {name for _, name in first.prompts()}
    assert len(names) == 2 and "" not in names, "each tenant has blocks of its own"

    later = Subscriber(context, served.endpoint)
    later.read_until(lambda: len(later.blocks) == 4)
    assert later.prompts() == first.prompts()
    for i in range(4):  # the pool holds ten chunks
        complete(served, "kr", f"{i}" * 200)
    complete(served, "kb", prompt)
    keys = {key for key, block in later.blocks.items() if block.token_ids[0] == tokens[0]}
    assert keys
    later.read_until(lambda: len(later.blocks) > 6)
    assert len(later.blocks) <= 10


def test_the_admin_ports_events_hold_no_tokens(served, context) -> None:
    reader = Subscriber(context, served.endpoint)
    reader.read_until(lambda: reader.is_cleared)
    with httpx.stream("GET", f"{served.admin}/admin/cache/events", timeout=120) as answer:
        lines = answer.iter_lines()
        complete(served, "kr", "z" * 80)
        reader.read_until(lambda: any(b.token_ids == [89] * 64 for b in reader.blocks.values()))
        data = [next(line for line in lines if '"type":"stored"' in line) for _ in range(2)]
    assert not any("contents" in line or "token" in line for line in data)


def test_endpoints_that_cannot_be_used_are_one_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^kv_events_endpoint: .*udp://127"):
        load_settings({"kv_events_endpoint": "udp://127.0.0.1:1"}, {})
    settings = Settings(kv_events_endpoint=f"ipc://{tmp_path}/none/socket")

    async def begin() -> None:
        async with publish_kv_events(settings, None):
            raise AssertionError("it was opened")

    with pytest.raises(ConfigError, match=r"^kv_events_endpoint: cannot open ipc:///.*: No such"):
        asyncio.run(begin())


class _Cache:
    """Stands for an engine: counts who watches its cache, and sends nothing or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.watching = 0

    async def watch_cache(self, max_waiting: int, *, with_contents: bool):
        self.watching += 1
        try:
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
            yield
        finally:
            self.watching -= 1


async def _until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_topic_subscribed_twice_ends_with_its_subscriber(context, tmp_path) -> None:
    engine, endpoint = _Cache(), f"ipc://{tmp_path}/socket"

    async def follow() -> None:
        async with publish_kv_events(Settings(kv_events_endpoint=endpoint), engine):
            for topics in ((b"", b""), (b"kv", b"kv", b"other")):
                with context.socket(zmq.SUB) as subscriber:
                    subscriber.connect(endpoint)
                    for topic in topics:
                        subscriber.setsockopt(zmq.SUBSCRIBE, topic)
                        await _until(lambda: engine.watching)
                await _until(lambda: not engine.watching)

    asyncio.run(follow())


def test_what_ends_publishing_is_logged(context, tmp_path, caplog) -> None:
    engine, endpoint = _Cache(ValueError("no such cache")), f"ipc://{tmp_path}/socket"

    async def fail() -> None:
        async with publish_kv_events(Settings(kv_events_endpoint=endpoint), engine):
            with context.socket(zmq.SUB) as subscriber:
                subscriber.setsockopt(zmq.SUBSCRIBE, b"")
                subscriber.connect(endpoint)
                await _until(lambda: "no such cache" in caplog.text)

    asyncio.run(fail())
