"""What a request costs is bounded before it is paid: grammars, queue, bodies, templates, store."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.logger import tenant_context
from chunkllama.messages import EngineRequest, EngineStats
from chunkllama.sampling_params import GrammarSpec, SamplingParams
from chunkllama_server.api.common.admission import ChargedEngine
from chunkllama_server.api.common.grammar_cost import regex_size
from chunkllama_server.api.common.lark_cost import lark_size
from chunkllama_server.api.common.response_store import ResponseStore, StoredResponse
from chunkllama_server.api.common.shared_reads import SharedReads
from chunkllama_server.api.common.structured_outputs import (
    GrammarChecker,
    check_schema,
    from_structured_outputs,
)
from chunkllama_server.api.common.text_service import RequestTemplate, TextService
from chunkllama_server.api.dashboard import SnapshotCache
from chunkllama_server.api.schema.base import StructuredOutputs
from chunkllama_server.api.schema.chat import ChatMessage, FunctionDefinition, InputFormat
from chunkllama_server.api.tools import config as tools_config
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError

MAX_CONTAINERS = DEFAULT_LIMITS.max_json_containers


@pytest.mark.parametrize(
    ("pattern", "forced", "expanded"),
    [
        ("abc", 3, 3),
        ("a{5}", 5, 5),
        ("a{2,7}", 2, 7),
        ("a{0,7}", 1, 7),
        ("(ab){3}c?", 7, 7),
        ("((a{10}b?){10}){100}", 11_000, 11_000),
        (r"\d{4}-\d{2}", 1, 7),
        (r"\n{9}", 9, 9),
        (r"\{5}x", 4, 4),
        ("[ab]{50}[a]{9}", 9, 59),
        ("[^]]{50}", 0, 50),
        (r"[\]]{3}", 3, 3),
        (".{0,9999}", 0, 9999),
        ("(?:a|b){1000}(?P<n>c)(?i:d)", 2002, 2002),
    ],
)
def test_regex_size(pattern, forced, expanded) -> None:
    assert regex_size(pattern) == (forced, expanded)


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "a{100000}"},
        {"regex": "(a{100}){100}"},
        {"regex": "(?:(?:aa{9}){9}b{99}){99}"},
        {"regex": "[a]{99999}"},
        {"regex": r"\x{99999}"},
        {"regex": "(a{100000})?"},
        {"regex": "b|a{100000}"},
        {"regex": "(.{1,9999}){9999}"},
        {"regex": "a{99999999999999999}"},
        {"regex": "a" * 4000},
        {"choice": ["x", "y" * 5000]},
        {"grammar": "start: /a{100000}/"},
        {"grammar": 'start: "a"{100000}'},
        {"grammar": 'start: "a"~100000'},
        {"grammar": 'start: ("a" "b")~5000..100000 x\n?x: "b"'},
        {"grammar": 'start: "' + "a" * 5000 + '"'},
        {"grammar": 'start: /"{3}/ /a{100000}/ // "'},
        {"json": {"const": "a" * 5000}},
        {"json": {"enum": ["a", "b" * 5000]}},
        {"json": {"type": "string", "pattern": "^a{100000}$"}},
        {"json": {"type": "array", "minItems": 100_000, "items": {"const": None}}},
        {"json": {"properties": {"a" * 5000: {}}}},
        {"json": {"$defs": {"x": {"const": "a" * 5000}}, "$ref": "#/$defs/x"}},
        {"json": {"anyOf": [{"type": "null"}, {"items": {"const": "a" * 5000}}]}},
        {
            "json": {
                "type": "array", "minItems": 50,
                "items": {"type": "array", "minItems": 50, "items": {"const": 1}},
            }
        },
    ],
)  # fmt: skip
def test_grammars_that_make_each_token_dear_are_refused(outputs) -> None:
    with pytest.raises(ApiError) as caught:
        from_structured_outputs(StructuredOutputs.model_validate(outputs), [])
    assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")
    assert caught.value.param == f"structured_outputs.{next(iter(outputs))}"


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": ".{0,100000}"},
        {"regex": r"(\d{1,3}\.){3}\d{1,3}"},
        {"regex": "[a-z]{1,5000}"},
        {"choice": ["yes", "no", "z" * 2000]},
        {"grammar": 'start: (word " ")~1..50\n// a "comment (\nword: /[a-z]{1,20}/'},
        {"json": {"type": "string", "maxLength": 100_000}},
        {"json": {"type": "array", "maxItems": 100_000, "items": {"type": "integer"}}},
        {"json": {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}},
                  "$ref": "#/$defs/n"}},
        {"json": {"description": "d" * 20_000, "properties": {f"p{i}": {} for i in range(100)}}},
    ],
)  # fmt: skip
def test_ordinary_grammars_are_not(outputs) -> None:
    assert from_structured_outputs(StructuredOutputs.model_validate(outputs), [])[0].text


LARK_SIZES = [
    ("start: " + "A " * 1000 + "\nA: /x{1000}/", 1_000_000, 1_001_000),
    ('start: A\nA: B{120}\nB: "xxxxxxxxxx"{150}', 216_000, 433_800),
    ('start: x x\nx: y y\ny: "abc" z{3}\nz: "d"', 56, 15),
    ('start: "a" "bc"? | "ddd"', 7, 12),
    ('start: ("x" ","){3,}', 24, 18),
    ('start: A{0} "b"\nA: "cccc"', 6, 9),
    ('start[suffix="abcde"]: /[a-z]+/', 7, 8),
    ('start: x x\nx: %lark { start: "abc" "d"{10} }', 70, 37),
    ('start: "a" // "b"{9}\n%ignore /x{50}/', 50, 53),
    ('start: expr\n?expr: expr "+" expr | N\nN: /[0-9]+/', 5, 8),
]


@pytest.mark.parametrize(("grammar", "forced", "expanded"), LARK_SIZES, ids=range(len(LARK_SIZES)))
def test_lark_size(grammar, forced, expanded) -> None:
    assert lark_size(grammar) == (forced, expanded)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: " + "A " * 1000 + "\nA: /x{1000}/",
        'start: A\nA: B{120}\nB: "xxxxxxxxxx"{150}',
        "start: c{40}\nc: " + f'%json {{"const": "{"a" * 100}"}}',
        "start: c{40}\nc: " + '%lark { start: b{10} b: "' + "a" * 8 + '" }',
        "start: k0" + "".join(f"\nk{i}: k{i + 1} k{i + 1}" for i in range(40)) + '\nk40: "a"',
        'start: r::0x0\nr::_ : "aaaa" r::incr(_) %if lt(_, 9999) | ""',
        "start: k0" + "".join(f"\nk{i}: k{i + 1}" for i in range(4000)),
    ],
    ids=["rules", "terminals", "schemas", "grammars", "doubled", "condition", "chain"],
)
def test_S6_uses_of_names_are_multiplied(grammar) -> None:
    """Also as the format of a custom tool."""
    for check in (
        lambda: from_structured_outputs(StructuredOutputs(grammar=grammar), []),
        lambda: _custom_tool(grammar),
    ):
        with pytest.raises(ApiError) as caught:
            check()
        assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")


def _custom_tool(grammar: str) -> None:
    given = FunctionDefinition(name="f").with_input(InputFormat("lark", grammar))
    tools_config._input_grammar({"tools[0]": given}, DEFAULT_LIMITS)


def test_a_grammar_of_many_rules_is_not_refused() -> None:
    levels = "\n".join(f'e{i}: e{i + 1} ("{i}op" e{i + 1})*' for i in range(12))
    words = "\n".join(f'w{i}: "a_keyword_{i}" e0' for i in range(200))
    choice = " | ".join(f"w{i}" for i in range(200))
    text = f'start: {choice}\n{words}\n{levels}\ne12: /[0-9]{{1,9}}/ | "(" e0 ")"'
    assert from_structured_outputs(StructuredOutputs(grammar=text), [])[0].kind == "lark"


@pytest.mark.parametrize("text", ["[" * 5000, "(" * 5000, "{9}" * 2000, "\\", "[^", '"', "a~"])
def test_sizes_of_malformed_grammars_are_computed(text) -> None:
    assert regex_size(text)[0] >= 0
    assert lark_size(text)[0] >= 0


def test_shared_references_are_computed_once() -> None:
    schema: dict[str, Any] = {"$defs": {"s0": {"type": "null"}}, "$ref": "#/$defs/s60"}
    for level in range(1, 61):
        branch = {"$ref": f"#/$defs/s{level - 1}"}
        schema["$defs"][f"s{level}"] = {"anyOf": [branch, dict(branch)]}
    assert check_schema(schema, "x")


class _Engine:
    """Answers nothing until it is told to; counts what reaches it."""

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

        check = encode = _note
        capabilities = variables = property(_note)

    def make(source: str) -> Any:
        seen.append(threading.current_thread().name)
        return Template()

    async def main() -> None:
        template = await service.chat_template("{{ messages }}")
        assert isinstance(template, RequestTemplate)
        assert template.capabilities == [1]
        await service.run(1, lambda: template.encode([]), template)
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
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(20):
        messages = [ChatMessage(role="user", content=chr(97 + i % 26)) for i in range(1000)]
        response: Any = {"id": str(index), "output": []}
        store.put("t", StoredResponse(response, messages))
        del messages
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 1.5 * store.num_bytes
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
    assert [size for size in sizes if size] == [10_000] * 20, "0: the answer's text"


def test_one_tenants_grammars_do_not_hold_up_anothers() -> None:
    order: list[str] = []
    has_begun, may_go_on = threading.Event(), threading.Event()

    def validate(spec: GrammarSpec) -> None:
        order.append(spec.text)
        if spec.text == "a0":
            has_begun.set()
            assert may_go_on.wait(60)

    async def main() -> None:
        limits = LimitsConfig(grammar_seconds=60, grammar_wait_seconds=60)
        checker = GrammarChecker(lambda: validate, limits)

        async def check(tenant: str, text: str) -> None:
            tenant_context.set(tenant)
            await checker.check(GrammarSpec(kind="regex", text=text), "x")

        await asyncio.create_task(check("a", "first"))
        tasks = [asyncio.create_task(check("a", f"a{i}")) for i in range(5)]
        await asyncio.to_thread(has_begun.wait, 60)
        gone = asyncio.create_task(check("b", "gone"))
        tasks.append(asyncio.create_task(check("b", "b0")))
        async with asyncio.timeout(60):
            while len(checker._pool._queues.get("b", ())) < 2:
                await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        may_go_on.set()
        await asyncio.gather(*tasks)
        checker.close()

    asyncio.run(main())
    assert order == ["first", "a0", "b0", "a1", "a2", "a3", "a4"]


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


class HeldGrammars:
    """A checker whose grammars called "slow" end when ``may_go_on`` is set."""

    def __init__(self, grammar_wait_seconds: float) -> None:
        self.may_go_on = threading.Event()
        self.num_held = 0
        limits = LimitsConfig(grammar_seconds=0.5, grammar_wait_seconds=grammar_wait_seconds)
        self.checker = GrammarChecker(lambda: self._validate, limits)

    def _validate(self, spec: GrammarSpec) -> None:
        if spec.text.startswith("slow"):
            self.num_held += 1
            assert self.may_go_on.wait(60)

    def begin(self, tenant: str, text: str) -> asyncio.Task[str]:
        """Check a grammar; gives "compiled", or the error's code and message."""

        async def check() -> str:
            tenant_context.set(tenant)
            try:
                await self.checker.check(GrammarSpec(kind="regex", text=text), "x")
            except ApiError as error:
                return f"{error.code}: {error.message}"
            return "compiled"

        return asyncio.create_task(check())

    async def wait_held(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.num_held < count:
                await asyncio.sleep(0.001)

    async def wait_overdue(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.checker.num_overdue() != count:
                await asyncio.sleep(0.001)


LATE = "grammar_too_complex: Compiling takes longer than 0.5 s"


def test_a_grammar_without_an_end_holds_up_its_own_tenant_alone() -> None:
    async def main() -> None:
        held = HeldGrammars(grammar_wait_seconds=60)
        first = held.begin("a", "slow")
        waiting = [held.begin("a", text) for text in ("slow 2", "next")]
        assert await first == LATE
        for tenant, text, answer in (
            ("b", "b", "compiled"),
            ("c", "slow", LATE),
            ("b", "c", "compiled"),
        ):
            assert await held.begin(tenant, text) == answer
        assert held.checker.num_overdue() == 2, "one of each tenant"
        assert not any(task.done() for task in waiting)
        held.may_go_on.set()
        assert await asyncio.gather(*waiting) == ["compiled"] * 2
        await held.wait_overdue(0)
        held.checker.close()

    asyncio.run(main())


def test_overdue_grammars_are_bounded_and_named_in_refusals() -> None:
    async def main() -> None:
        held = HeldGrammars(grammar_wait_seconds=1.0)
        for number, tenant in enumerate("abc", start=1):
            left = held.begin(tenant, "slow")
            await held.wait_held(number)
            left.cancel()  # its client leaves, its thread goes on
            await held.wait_overdue(number)
        busy = "grammar_compiler_busy: The grammar compiler is busy with "
        answers = await asyncio.gather(held.begin("a", "a"), held.begin("d", "d"))
        own = "an earlier grammar of yours that takes too long"
        assert answers == [f"{busy}{own}", f"{busy}others"]
        assert held.checker.num_overdue() == 3
        held.may_go_on.set()
        await held.wait_overdue(0)
        assert await held.begin("a", "a") == await held.begin("d", "d") == "compiled"
        held.checker.close()

    asyncio.run(main())
