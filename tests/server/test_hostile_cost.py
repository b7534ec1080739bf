"""What a request costs is bounded before it is paid: queue, bodies, templates, reads, store."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.messages import EngineRequest, EngineStats
from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.common.admission import ChargedEngine
from chunkllama_server.api.common.response_store import ResponseStore, StoredResponse
from chunkllama_server.api.common.shared_reads import SharedReads
from chunkllama_server.api.common.text_service import RequestTemplate, TextService
from chunkllama_server.api.dashboard import SnapshotCache
from chunkllama_server.api.schema.chat import ChatMessage
from chunkllama_server.config.limits import DEFAULT_LIMITS
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError

MAX_CONTAINERS = DEFAULT_LIMITS.max_json_containers


class _Engine:
    """Answers nothing until ``go`` is set; counts what reaches it."""

    info = None
    is_ready = True

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.go = asyncio.Event()
        self.snapshots = 0

    async def generate(self, request: EngineRequest):
        self.entered.append(request.request_id)
        await self.go.wait()
        yield request.request_id

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        self.snapshots += 1
        await asyncio.sleep(0)
        return EngineStats()


def _request(name: str, n: int) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=[1], sampling=SamplingParams(n=n, seed=1)
    )


def test_requests_are_charged_by_their_choices_before_the_engine() -> None:
    async def main() -> None:
        engine = _Engine()
        charged = ChargedEngine(engine, 8, 2)

        async def run(name: str, n: int) -> list[Any]:
            return [delta async for delta in charged.generate(_request(name, n))]

        big = asyncio.create_task(run("big", 128))
        await asyncio.sleep(0)
        assert charged.num_sequences == 128, "an idle server takes any request"
        with pytest.raises(OverloadedError, match="128 sequences"):
            await run("refused", 1)
        engine.go.set()
        assert await big == ["big"]
        assert charged.num_sequences == 0
        engine.go.clear()
        fits = [asyncio.create_task(run(f"n{n}", n)) for n in (3, 7)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await run("refused", 1)
        fits[0].cancel()
        await asyncio.wait(fits[:1])
        assert charged.num_sequences == 7
        engine.go.set()
        assert await fits[1] == ["n7"]
        assert engine.entered == ["big", "n3", "n7"]

    asyncio.run(main())


def test_a_full_server_answers_429_with_retry_after(start_server) -> None:
    server = start_server(max_num_seqs=2, max_waiting=2)
    server.engine.delay = 0.5
    body = {"model": "alias", "prompt": "say(abcdefgh)yas", "n": 4, "max_tokens": 8}
    first = threading.Thread(target=server.post, args=("/v1/completions", body))
    first.start()
    deadline = time.monotonic() + 10
    while not server.engine.live and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = server.post("/v1/completions", {**body, "n": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "engine_overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    first.join()
    server.engine.reset()
    assert server.post("/v1/completions", {**body, "n": 1}).status_code == 200


@pytest.mark.parametrize("item", [b"[1]", b"{}", b"[]", b'{"a":[]}', b'["\\"["]'])
def test_many_containers_are_refused_before_they_are_parsed(item, monkeypatch) -> None:
    raw = b'{"prompt":[' + b",".join([item] * (MAX_CONTAINERS + 1)) + b"]}"
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ApiError, match=str(MAX_CONTAINERS)):
        parse_json(raw)


def test_brackets_in_texts_are_not_counted() -> None:
    text = '[{"' * MAX_CONTAINERS
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_template_of_a_request_never_runs_on_the_event_loop(text_parts) -> None:
    seen: list[str] = []

    class Template:
        def _note(self, *_: Any, **__: Any) -> list[int]:
            seen.append(threading.current_thread().name)
            return [1]

        check = render = _note
        capabilities = variables = property(_note)

    def make(source: str) -> Any:
        seen.append(threading.current_thread().name)
        return Template()

    async def main() -> None:
        template = await service.chat_template("{{ messages }}")
        assert isinstance(template, RequestTemplate)
        assert template.capabilities == [1]
        await service.run(1, lambda: template.render([]), template)
        with pytest.raises(ApiError, match="at most"):
            await service.chat_template("x" * 100_000)

    service = TextService(*text_parts, make_template=make)
    asyncio.run(main())
    assert len(seen) == 5
    assert all(name.startswith("template") for name in seen)
    service.close()


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source", [LOOP, "{{ 'a' * 10**9 }}", "{{", "{{ 1/0 }}", "{{ messages.x.y }}", "{% if %}"]
)
def test_a_hostile_template_of_a_request_is_400(start_server, source) -> None:
    server = start_server(trust_request_chat_template=True)
    response = server.chat("hi", chat_template=source)
    assert response.status_code == 400
    assert "\n" not in response.json()["error"]["message"]
    fine = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    assert server.chat("say(ab)yas", chat_template=fine).status_code == 200


def test_a_template_that_was_slow_once_leaves_the_event_loop(text_parts) -> None:
    service = TextService(*text_parts)
    names: list[str] = []

    def work(seconds: float) -> None:
        names.append(threading.current_thread().name)
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    async def main() -> None:
        for seconds in (0.0, 0.06, 0.0):
            await service.run(10, lambda seconds=seconds: work(seconds))

    asyncio.run(main())
    assert names[:2] == ["MainThread"] * 2
    assert names[2].startswith("text")
    service.close()


def test_dashboards_share_one_snapshot() -> None:
    async def main() -> None:
        engine = _Engine()
        cache = SnapshotCache(60.0)
        await asyncio.gather(*(cache.get(engine) for _ in range(50)))
        await cache.get(engine)
        assert engine.snapshots == 1
        eager = SnapshotCache(0.0)
        await eager.get(engine)
        await asyncio.sleep(0.001)
        await eager.get(engine)
        assert engine.snapshots == 3

    asyncio.run(main())


def test_stored_responses_hold_what_they_are_counted_for() -> None:
    import tracemalloc

    store = ResponseStore(1000, 64 << 20, 60.0)

    def put(index: int) -> None:
        messages = [ChatMessage(role="user", content=chr(97 + i % 26)) for i in range(1000)]
        response: Any = {"id": str(index), "output": []}
        given = [{"id": f"msg_{index}_{i}", "type": "message"} for i in range(index % 3 * 50)]
        store.put("t", StoredResponse(response, messages, given))

    put(0)  # what is made once
    tracemalloc.start()
    before, counted = tracemalloc.get_traced_memory()[0], store.num_bytes
    for index in range(1, 100):
        put(index)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 1.5 * (store.num_bytes - counted)
    assert store.get("t", "7").load().messages[3] == ChatMessage(role="user", content="d")


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")]
)
def test_many_short_texts_are_tokenized_like_a_long_one(
    start_server, monkeypatch, path, field
) -> None:
    server = start_server()
    text = server.app.state.context.text
    run, sizes = text.run, []

    async def noting(size: int, *arguments: Any) -> Any:
        sizes.append(size)
        return await run(size, *arguments)

    monkeypatch.setattr(text, "run", noting)
    body = {"model": "alias", field: ["say(ab)yas" * 50] * 20}
    answer = server.post(path, body | ({"max_tokens": 1} if field == "prompt" else {}))
    assert answer.status_code == 200, answer.text[:300]
    assert [size for size in sizes if size] == [10_000] * 2, "0: the answer's text"


def test_reads_are_shared_and_take_a_fifth_of_the_time() -> None:
    now, began, running = [0.0], [], [0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        await asyncio.sleep(0)

    def reader(view: str | None) -> Any:
        async def read() -> tuple[str | None, int]:
            running[0] += 1
            assert running[0] == 1, "one at a time"
            began.append(now[0])
            number = len(began)
            now[0] += 1.0
            await asyncio.sleep(0)
            running[0] -= 1
            return view, number

        return read

    async def main() -> None:
        reads = SharedReads(lambda: now[0], sleep)
        views = ["a", None, "b"] * 20
        found = await asyncio.gather(*(reads.get("x", view, reader(view)) for view in views))
        assert sorted(set(found), key=str) == [("a", 1), ("b", 3), (None, 2)]
        assert began == [0.0, 5.0, 10.0]

        async def late() -> tuple[str | None, int]:
            async with asyncio.timeout(60):
                while running[0] == 0:
                    await asyncio.sleep(0)
            return await reads.get("x", "a", reader("a"))

        first, second = await asyncio.gather(reads.get("x", "a", reader("a")), late())
        assert (first[1], second[1]) == (4, 5), "one that has begun is older than the call"
        now[0] += 100.0
        assert (await reads.get("x", "a", reader("a")))[1] == 6
        assert began[5] == now[0] - 1.0, "after a pause of its own it begins at once"

    asyncio.run(main())


def test_a_failed_read_is_tried_again() -> None:
    async def fail() -> None:
        raise ValueError("once")

    async def fine() -> int:
        return 7

    async def main() -> None:
        reads = SharedReads()
        with pytest.raises(ValueError, match="once"):
            await reads.get("x", None, fail)
        assert await reads.get("x", None, fine) == 7

    asyncio.run(main())


@pytest.mark.parametrize("value", [1e-300, 0.0, 0.001, float("nan"), 101.0])
def test_repetition_penalties_that_overflow_are_refused(value) -> None:
    with pytest.raises(InvalidRequestError, match="repetition_penalty"):
        SamplingParams(repetition_penalty=value)


def test_a_text_at_which_the_tokenizer_fails_is_400(server, monkeypatch) -> None:
    """The library reports a failed assertion as an error that is no Exception."""

    class PanicException(BaseException):
        pass

    class Backend:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise PanicException("Onig: Regex search error")

    for name in ("_plain", "_backend"):
        monkeypatch.setattr(server.app.state.context.text.tokenizer, name, Backend())
    for text in ("short", "long " * 5000):
        answer = server.post("/v1/completions", {"model": "alias", "prompt": text})
        assert answer.status_code == 400, answer.text
        assert (
            f"fails at a text of {len(text)} characters (Onig" in answer.json()["error"]["message"]
        )
