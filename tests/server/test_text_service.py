"""Test the way from text to ids: limits, models without a template, templates that refuse."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import MODEL, FakeEngine
from fastapi.testclient import TestClient

from chunkllama.resources import lower_priority, run_when_idle
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.chat_template import ChatTemplate
from chunkllama_server.api.app import create_app
from chunkllama_server.api.common import text_service
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService, text_size
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import Tenants
from chunkllama_server.transport.errors import ApiError

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def without_template(text_parts):
    """An application over a model that has no chat template."""
    tokenizer, _ = text_parts
    app = create_app(
        FakeEngine(tokenizer),
        TextService(tokenizer, None),
        Settings(served_model_name=(MODEL,)),
        Tenants(),
        GrammarChecker(lambda: lambda spec: None),
    )
    with TestClient(app) as client:
        yield client


def test_a_model_without_template_still_completes(without_template):
    chat = without_template.post(CHAT, json={"model": MODEL, "messages": HELLO})
    assert chat.status_code == 400
    assert "/v1/completions" in chat.json()["error"]["message"]
    body = {"model": MODEL, "prompt": "say(x)yas"}
    answer = without_template.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == "x"


def test_a_template_that_refuses_the_conversation(start_server):
    server = start_server(trust_request_chat_template=True)
    response = server.chat(chat_template="{{ raise_exception('roles must alternate') }}")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "roles must alternate" in error["message"]


def test_long_texts_leave_the_event_loop(text_parts):
    tokenizer, _ = text_parts
    service = TextService(tokenizer, None, limits=LimitsConfig(text_offload_chars=10))

    async def threads() -> list[str]:
        return [
            await service.run(size, lambda: threading.current_thread().name) for size in (9, 11)
        ]

    here, there = asyncio.run(threads())
    assert here == threading.current_thread().name
    assert there.startswith("text")


def test_every_string_of_a_conversation_counts():
    message = {"role": "user", "content": "abc", "reasoning_content": "de"}
    tools = [{"function": {"name": "f", "parameters": {"x": [1, "gh", None]}}}]
    assert text_size([message]) == 32 + len("roleusercontentabcreasoning_contentde")
    # 3 objects
    more = 3 * 32 + len("functionnamefparametersxgh")
    assert text_size([message, tools]) == text_size([message]) + more


def test_many_short_messages_are_a_long_text():
    messages = [{"role": "user", "content": "a"}] * 300
    assert text_size(messages) > LimitsConfig().text_offload_chars


def test_texts_that_wait_too_long_may_come_again(text_parts):
    tokenizer, _ = text_parts
    service = TextService(
        tokenizer, None, limits=LimitsConfig(text_offload_chars=0, text_seconds=0.05)
    )
    with pytest.raises(ApiError) as caught:
        asyncio.run(service.run(1, lambda: time.sleep(0.3)))
    assert (caught.value.status_code, caught.value.code) == (503, "tokenizer_busy")


def test_an_answer_waits_for_the_thread_as_long_as_it_has_to(text_parts):
    tokenizer, _ = text_parts
    service = TextService(
        tokenizer, None, limits=LimitsConfig(text_offload_chars=0, text_seconds=0.05)
    )
    gate = threading.Event()

    async def scenario() -> str:
        first = asyncio.create_task(service.write(1, gate.wait))
        answer = asyncio.create_task(service.write(1, lambda: "answer"))
        await asyncio.sleep(0)  # both are queued
        with pytest.raises(ApiError):
            await service.prepare(1, lambda: "body")
        gate.set()
        await first
        return await answer

    assert asyncio.run(scenario()) == "answer"


def test_function_call_of_an_old_client(server, text_parts):
    messages = [
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
        *HELLO,
    ]
    assert server.post(CHAT, {"model": MODEL, "messages": messages}).status_code == 200
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert 'f{"a": 1}' in prompt
    assert "tool\n2" in prompt


def test_a_refusal_part_is_text(server, text_parts):
    parts = [{"type": "refusal", "refusal": "I will not"}]
    messages = [{"role": "assistant", "content": parts}, {"role": "assistant", "refusal": "No"}]
    assert server.post(CHAT, {"model": MODEL, "messages": messages}).status_code == 200
    prompt = text_parts[0].decode(server.engine.requests[0].prompt_token_ids)
    assert "assistant\nI will not" in prompt
    assert "assistant\nNo" in prompt


def test_other_threads_run_while_a_long_text_is_tokenized(text_parts):
    tokenizer, _ = text_parts
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.002):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    ids = tokenizer.encode("a" * 1_000_000)
    done.set()
    thread.join()
    assert len(ids) == 1_000_000
    assert len(ticks) >= 5, "the tokenizer held the interpreter"


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_large_text_leaves_the_processors_to_steps(text_parts, monkeypatch):
    """A prompt of ordinary length runs as threads usually do, so that busy neighbours cannot hold
    it up; so do many texts of one request."""
    monkeypatch.setattr(text_service, "_LARGE", 160)
    tokenizer, _ = text_parts
    seen: list[tuple[str, int]] = []

    class Watched:
        def encode(self, text: str, **options: bool) -> list[int]:
            seen.append((threading.current_thread().name, os.sched_getscheduler(0)))
            return tokenizer.encode(text, **options)

    async def main() -> list[list[int]]:
        sizes = ((160, None), (161, None), (5, None), (6, 1000))
        return [
            await service.encode("a" * length, add_special_tokens=False, size=size)
            for length, size in sizes
        ]

    service = TextService(Watched(), None, limits=LimitsConfig(text_offload_chars=10))
    try:
        ids = asyncio.run(main())
    finally:
        service.close()
    assert [len(found) for found in ids] == [160, 161, 5, 6]
    usual, thread = os.sched_getscheduler(0), ("text_0", os.sched_getscheduler(0))
    large = ("large-text_0", os.SCHED_IDLE)
    assert seen == [thread, large, ("MainThread", usual), thread]


def test_a_large_text_that_gets_no_processor_is_read_in_the_usual_thread(text_parts, monkeypatch):
    monkeypatch.setattr(text_service, "_LARGE", 160)
    tokenizer, _ = text_parts
    released, seen = threading.Event(), list[str]()

    class Starved:
        def encode(self, text: str, **options: bool) -> list[int]:
            seen.append(threading.current_thread().name)
            if seen[-1].startswith("large"):
                released.wait()
            return tokenizer.encode(text, **options)

    async def main() -> list[int]:
        ids = await service.encode("a" * 200, add_special_tokens=False)
        released.set()
        return ids

    limits = LimitsConfig(text_offload_chars=10, text_seconds=2.0)
    service = TextService(Starved(), None, limits=limits)
    try:
        assert len(asyncio.run(main())) == 200
    finally:
        released.set()
        service.close()
    assert seen == ["large-text_0", "text_0"]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_large_chat_is_rendered_as_usual_and_its_tokens_leave_the_processors_to_steps(
    text_parts, monkeypatch
):
    """Rendering holds the interpreter's lock, which a thread without a processor would keep."""
    monkeypatch.setattr(text_service, "_LARGE", 1000)
    tokenizer, template = text_parts
    seen: list[tuple[str, str]] = []

    def noting(owner: type, name: str) -> None:
        work = getattr(owner, name)

        def noted(*arguments, **options):
            if "b" * 100 in str(arguments):  # not the end of another test's text
                seen.append((name, threading.current_thread().name.rpartition("_")[0]))
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    noting(ChatTemplate, "_fill")
    noting(type(tokenizer), "encode")
    app = create_app(
        FakeEngine(tokenizer),
        TextService(tokenizer, template, limits=LimitsConfig(text_offload_chars=100)),
        Settings(served_model_name=(MODEL,)),
        Tenants(),
        GrammarChecker(lambda: lambda spec: None),
    )
    with TestClient(app) as client:
        for length in (200, 1500):
            seen.clear()
            body = {"messages": [{"role": "user", "content": "b" * length}], "max_tokens": 1}
            assert client.post(CHAT, json={"model": MODEL, **body}).status_code == 200
            where = "text" if length < 1000 else "large-text"
            assert seen[:2] == [("_fill", "text"), ("encode", where)]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_grammars_are_compiled_behind_steps():
    seen: list[int] = []
    checker = GrammarChecker(lambda: lambda spec: seen.append(os.nice(0)))

    async def main() -> None:
        await checker.check(GrammarSpec(kind="regex", text="a"), "structured_outputs")

    try:
        asyncio.run(main())
    finally:
        checker.close()
    assert seen == [min(os.nice(0) + 5, 19)]


def test_a_sandbox_without_priorities_runs_the_work_all_the_same(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "nice", refuse)
    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    for begin in (lower_priority, run_when_idle):
        with ThreadPoolExecutor(1, "", begin) as pool:
            assert pool.submit(lambda: 1).result(timeout=60) == 1
