"""The answer without its thoughts is prefilled while no request runs, and only then."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from fake_engine import MODEL

from chunkllama.errors import EngineDeadError, InvalidRequestError
from chunkllama.messages import ChoiceDelta, TokenDelta
from chunkllama_server.api.common.idle_prefill import LOWEST_PRIORITY, IdlePrefill, PrefillJob

# As Qwen3's: the thoughts of earlier turns are dropped.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
KEEPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "The capital of France is Paris, on the Seine."
THINKS = f"say(<think>\nlet me see\n</think>\n\n{ANSWER})yas"
# Longer than one slice.
LONG = f"say(<think>\nhm\n</think>\n\n{ANSWER * 12})yas"


def idle_requests(server):
    return [r for r in server.engine.requests if r.request_id.startswith("idle-")]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def is_done(server) -> bool:
    idle = server.app.state.context.idle
    return idle._task is not None and idle._task.done()


@pytest.fixture(scope="module")
def drops(start_server):
    return start_server(template_source=DROPS, idle_prefill=True)


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [THINKS, LONG], ids=["short", "long"])
def test_the_next_prompt_begins_with_what_was_prefilled(drops, endpoint, stream, asked):
    drops.engine.reset()
    ask = {"role": "user", "content": asked}
    path = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}[endpoint]
    field = {"chat": "messages", "responses": "input"}[endpoint]
    answer = drops.post(path, {"model": MODEL, field: [ask], "stream": stream})
    assert answer.status_code == 200, answer.text
    until(lambda: idle_requests(drops) and is_done(drops))
    made = idle_requests(drops)
    assert all(r.sampling.max_tokens == 0 and r.priority == LOWEST_PRIORITY for r in made)
    assert len(made) == (1 if asked == THINKS else 3)
    text = ANSWER if asked == THINKS else ANSWER * 12
    said = {"role": "assistant", "content": text}
    follow = {"role": "user", "content": "and of Norway?"}
    drops.post("/v1/chat/completions", {"model": MODEL, "messages": [ask, said, follow]})
    prompt = drops.engine.requests[-1].prompt_token_ids
    prefix = made[-1].prompt_token_ids
    assert prompt[: len(prefix)] == prefix
    assert text in drops.engine.tokenizer.decode(prefix)


@pytest.mark.parametrize(
    ("template", "body"),
    [
        (DROPS, {"messages": [{"role": "user", "content": "say(Paris)yas"}]}),
        (DROPS, {"messages": [{"role": "user", "content": THINKS}], "n": 2}),
        (KEEPS, {"messages": [{"role": "user", "content": THINKS}]}),
        (
            DROPS,
            {
                "messages": [{"role": "user", "content": 'say(<think>hm</think>{"name": "f"})yas'}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        ),
    ],
    ids=["no thoughts", "choices", "kept thoughts", "a call"],
)
def test_nothing_is_prefilled_where_it_would_not_help(start_server, template, body):
    server = start_server(template_source=template, idle_prefill=True)
    assert server.post("/v1/chat/completions", {"model": MODEL, **body}).status_code == 200
    assert server.app.state.context.idle._task is None
    assert not idle_requests(server)


def test_it_waits_for_other_requests(drops):
    drops.engine.reset()
    answers = []
    drops.engine.gate.clear()
    drops.engine.gate_at = 10**9
    assert drops.chat(THINKS).status_code == 200
    until(lambda: idle_requests(drops) and is_done(drops))
    drops.engine.requests.clear()
    # One request holds the engine while another ends with thoughts.
    drops.engine.gate_at = 1
    held = threading.Thread(target=lambda: answers.append(drops.chat("say(held)yas")))
    held.start()
    until(lambda: drops.app.state.context.engine.num_sequences == 1)
    until(lambda: drops.engine.requests)
    drops.engine.gate_at = 10**9
    other = drops.chat(THINKS + " again")
    assert other.status_code == 200
    assert not idle_requests(drops)
    drops.engine.gate.set()
    held.join()
    until(lambda: idle_requests(drops) and is_done(drops))


class Engine:
    """Ends a request when the test asks for it; an abort ends it as one."""

    def __init__(self) -> None:
        self.requests = []
        self.ends: asyncio.Queue[str | Exception] = asyncio.Queue()

    async def generate(self, request):
        self.requests.append(request)
        end = await self.ends.get()
        if isinstance(end, Exception):
            raise end
        choice = ChoiceDelta(index=0, token_ids=[], finish_reason=end)
        yield TokenDelta(request_id=request.request_id, choices=[choice])

    async def abort(self, request_id, index=None) -> None:
        assert request_id == self.requests[-1].request_id
        self.ends.put_nowait("abort")


def job(length: int, known: int = 0) -> PrefillJob:
    ids = list(range(length))

    async def token_ids() -> list[int]:
        return ids

    return PrefillJob("space", "blue", token_ids, ids[:known])


async def settle(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


def test_an_interrupted_slice_is_computed_again() -> None:
    async def scenario() -> None:
        engine, busy = Engine(), False
        idle = IdlePrefill(engine, lambda: not busy)
        idle.offer(job(600, known=100))
        await settle(lambda: len(engine.requests) == 1)
        assert len(engine.requests[0].prompt_token_ids) == 356
        assert (engine.requests[0].tenant, engine.requests[0].namespace) == ("blue", "space")
        busy = True
        await idle.interrupt()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.requests) == 1, "it waits while others run"
        busy = False
        idle.resume()
        for count, length in ((2, 356), (3, 600)):
            await settle(lambda count=count: len(engine.requests) == count)
            assert len(engine.requests[-1].prompt_token_ids) == length
            engine.ends.put_nowait("length")
        await settle(lambda: idle._task.done())
        await idle.interrupt()  # nothing runs
        assert len(engine.requests) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "others"), [(InvalidRequestError("too long"), 1), (EngineDeadError("gone"), 0)]
)
def test_a_job_that_fails_is_dropped(error, others) -> None:
    async def scenario() -> None:
        engine = Engine()
        idle = IdlePrefill(engine, lambda: True)
        idle.offer(job(50))
        idle.offer(job(40))
        idle.offer(job(45, known=44))
        engine.ends.put_nowait(error)
        engine.ends.put_nowait("length")
        await settle(lambda: idle._task.done())
        assert len(engine.requests) == 1 + others
        await idle.close()

    asyncio.run(scenario())


def test_closing_ends_the_work() -> None:
    async def scenario() -> None:
        engine = Engine()
        idle = IdlePrefill(engine, lambda: True)
        idle.offer(job(50))
        await settle(lambda: engine.requests)
        await idle.close()
        assert idle._task.done()

    asyncio.run(scenario())
