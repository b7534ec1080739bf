"""cache_control: what is stored, how long it is kept, and the usage to the token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from anthropic_helpers import (
    PATH,
    WEATHER,
    accumulated,
    body_of,
    events_of,
    prompt_of,
    say,
    sdk,
)
from fake_engine import MODEL
from tiny_model import write_tiny_model
from tiny_server import TinyServer, serve

MINUTES = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}


def text(value: str, control: dict | None = None) -> dict:
    return {"type": "text", "text": value, **({"cache_control": control} if control else {})}


def stored_text(server, text_parts) -> str:
    request = next(r for r in reversed(server.engine.requests) if r.cache_until is not None)
    kept = request.prompt_token_ids[: request.cache_until]
    return text_parts[0].decode(kept, skip_special_tokens=False)


def send(server, **fields) -> dict:
    response = server.post(PATH, body_of(fields.pop("messages", say("x")), **fields))
    assert response.status_code == 200, response.text
    return response.json()["usage"]


CALLED = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "x"}}],
}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "rain"}


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"system": [text("rules", MINUTES)]}, "system\nrules<|im_end|>\n<|im_start|>user\n"),
        ({"system": [text("rules", MINUTES), text("more")]}, "system\nrules"),
        ({"messages": [{"role": "user", "content": [text("doc", MINUTES), text("q")]}]}, "doc"),
        ({"cache_control": MINUTES}, "user\nsay(x)yas"),
        (
            {"messages": [*say("a"), {**CALLED, "content": [{**CALLED["content"][0],
             "cache_control": MINUTES}]}, {"role": "user", "content": [RESULT]}],
             "tools": [WEATHER]},
            'weather{"city": "x"}',
        ),
        (
            {"messages": [*say("a"), CALLED,
             {"role": "user", "content": [{**RESULT, "cache_control": MINUTES}, text("q")]}],
             "tools": [WEATHER]},
            "tool\nrain",
        ),
        (
            {"messages": [*say("a"), CALLED,
             {"role": "user", "content": [{**RESULT, "content": [text("rain", MINUTES),
              text("sun")]}, text("q")]}],
             "tools": [WEATHER]},
            "tool\nrain",
        ),
        (
            {"messages": [*say("a"), CALLED,
             {"role": "user", "content": [{**RESULT, "is_error": True,
              "content": [text("rain"), text("sun", MINUTES)]}]}],
             "tools": [WEATHER]},
            "tool\nError: rain\nsun",
        ),
    ],
)  # fmt: skip
def test_where_a_mark_ends(server, text_parts, fields, end) -> None:
    send(server, **fields)
    assert stored_text(server, text_parts).endswith(end)


def test_a_mark_on_a_tool_ends_behind_it(server, text_parts) -> None:
    tools = [WEATHER, {**WEATHER, "name": "later"}]
    send(server, tools=[{**tools[0], "cache_control": MINUTES}, tools[1]])
    first = stored_text(server, text_parts)
    assert '"weather"' in first and "later" not in first and "say" not in first
    send(server, tools=[tools[0], {**tools[1], "cache_control": MINUTES}])
    both = stored_text(server, text_parts)
    assert both.startswith(first) and '"later"' in both and "say" not in both


def test_a_mark_on_the_system_prompt_includes_tools_behind_it(start_server) -> None:
    """A template that writes the tools after the system prompt, as most do."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.first and tools %}\nTOOLS {{ tools | tojson }}{% endif %}<|im_end|>\n"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    server = start_server(template_source=source)
    fields = {"system": [text("rules", MINUTES)], "tools": [WEATHER]}
    send(server, messages=say("one"), **fields)
    first = server.engine.requests[-1]
    usage = send(server, messages=say("another"), **fields)
    assert usage["cache_read_input_tokens"] == first.cache_until
    kept = server.engine.tokenizer.decode(first.prompt_token_ids[: first.cache_until], False)
    assert "TOOLS" in kept and '"weather"' in kept


def claude_code(number: int, form: str) -> dict:
    """A system prompt as Claude Code begins it, with a line that differs in each request."""
    line = f"x-anthropic-billing-header: cc_version=2.1.37; cc_entrypoint=cli; cch={number:05x};"
    if form == "text":
        return {"system": f"{line}\nYou are Claude Code", "cache_control": MINUTES}
    first = [text(line)] if form == "block" else [text(f"{line}\nfirst")]
    return {"system": [*first, text("You are Claude Code", MINUTES)]}


@pytest.mark.parametrize(("form", "path"), [("text", "system"), ("block", "system[0]"),
                                            ("line", "system[0]")])  # fmt: skip
def test_a_line_about_billing_hides_no_prefix(server, text_parts, form, path) -> None:
    first = server.post(PATH, body_of(say("one"), **claude_code(1, form)))
    assert first.headers["x-chunkllama-repaired-history"] == path
    kept = server.engine.requests[-1]
    send(server, **claude_code(2, form))
    second = server.engine.requests[-1]
    until = kept.cache_until if form != "text" else len("<|im_start|>system\nYou are Claude Code")
    assert second.prompt_token_ids[:until] == kept.prompt_token_ids[:until]
    assert "billing" not in text_parts[0].decode(second.prompt_token_ids)


def test_a_system_prompt_of_that_line_alone_is_none(server, text_parts) -> None:
    send(server, system="x-anthropic-billing-header: cch=1;")
    assert prompt_of(server, text_parts).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("system", "seconds"),
    [
        ([text("a", MINUTES)], 300.0),
        ([text("a", {**MINUTES, "ttl": "5m"})], 300.0),
        ([text("a", HOUR)], 3600.0),
        ([text("a", HOUR), text("b", MINUTES)], 3600.0),
    ],
)
def test_times(server, system, seconds) -> None:
    send(server, system=system)
    assert server.engine.requests[-1].pin_seconds == seconds


def test_without_a_mark_nothing_is_created(server) -> None:
    usage = send(server)
    request = server.engine.requests[-1]
    assert (request.cache_until, request.pin_seconds) == (None, 0.0)
    assert usage["cache_creation_input_tokens"] == usage["cache_read_input_tokens"] == 0
    assert usage["input_tokens"] == len(request.prompt_token_ids)


def test_both_times_are_told_apart(server) -> None:
    system = [text("hour " * 5, HOUR), text("minutes " * 3, MINUTES)]
    usage = send(server, system=system)
    request = server.engine.requests[-1]
    hour = len("<|im_start|>system\n") - len("<|im_start|>") + 1 + len("hour " * 5)
    assert usage["cache_creation"] == {
        "ephemeral_1h_input_tokens": hour,
        "ephemeral_5m_input_tokens": request.cache_until - hour,
    }
    assert usage["cache_creation_input_tokens"] == request.cache_until
    assert usage["input_tokens"] == len(request.prompt_token_ids) - request.cache_until


def test_without_prefix_caching_nothing_is_created(start_server) -> None:
    server = start_server(enable_prefix_caching=False)
    response = server.post(PATH, body_of(say("x"), system=[text("rules", HOUR)]))
    usage = response.json()["usage"]
    assert "x-chunkllama-cache-pin" not in response.headers
    assert usage["cache_creation_input_tokens"] == usage["cache_read_input_tokens"] == 0
    assert usage["input_tokens"] == len(server.engine.requests[-1].prompt_token_ids)
    chat = server.chat(prompt_cache_options={"ttl": "30m"})
    assert "x-chunkllama-cache-pin" not in chat.headers
    assert chat.json()["usage"]["prompt_tokens_details"]["cache_write_tokens"] == 0


def test_a_full_pin_budget_creates_nothing(server, monkeypatch) -> None:
    """The request is served, and the prefix is stored without a pin."""
    real = type(server.engine)._deltas

    async def refusing(self, request):
        async for delta in real(self, request):
            delta.pin_refused = True
            yield delta

    monkeypatch.setattr(type(server.engine), "_deltas", refusing)
    body = body_of(say("x"), system=[text("rules", MINUTES)])
    response = server.post(PATH, body)
    usage = response.json()["usage"]
    assert response.headers["x-chunkllama-cache-pin"] == "over-budget"
    assert usage["cache_creation_input_tokens"] == 0
    assert usage["input_tokens"] == len(server.engine.requests[-1].prompt_token_ids)
    streamed = accumulated(events_of(server, body))["usage"]
    assert streamed["cache_creation_input_tokens"] == 0


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    """A real server whose pins disturb no other test."""
    folder = tmp_path_factory.mktemp("anthropic")
    write_tiny_model(folder)
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="module")
def real(own_server: TinyServer):
    return sdk(own_server)


def usage_of(message) -> tuple[int, int, int]:
    usage = message.usage
    return (
        usage.cache_creation_input_tokens,
        usage.cache_read_input_tokens,
        usage.input_tokens,
    )


@pytest.mark.parametrize("length", [10, 57, 58, 100])
def test_a_cached_second_turn_on_a_real_engine(real, length) -> None:
    """Lengths on both sides of the ends of chunks of 64 tokens, one a character."""
    system = [text(chr(97 + length % 26) * length, MINUTES)]
    prefix = len(system[0]["text"]) + 1 + len("system\n") + 2 + 1 + len("user\n")

    def ask(question: str):
        return real.messages.create(
            model=MODEL,
            max_tokens=2,
            system=system,
            messages=[{"role": "user", "content": question}],
        )

    rest = 1 + 1 + 1 + len("assistant\n")
    created, read, new = usage_of(ask("one"))
    assert read <= len("system\n") + 1, "what every conversation begins with"
    assert (created + read, new) == (prefix, len("one") + rest)
    assert usage_of(ask("three")) == (0, prefix, len("three") + rest)
    with real.messages.stream(
        model=MODEL,
        max_tokens=2,
        system=system,
        messages=[{"role": "user", "content": "four"}],
    ) as stream:
        assert usage_of(stream.get_final_message()) == (0, prefix, len("four") + rest)


def test_a_growing_conversation_on_a_real_engine(real) -> None:
    """Each turn marks its last block: the next reads it all and creates what is new."""
    messages = [{"role": "user", "content": [text("Q" * 20, MINUTES)]}]
    created, read, rest = usage_of(
        real.messages.create(model=MODEL, max_tokens=2, messages=messages)
    )
    first = 1 + len("user\n") + 20
    assert created + read == first and read <= len("user\n") + 1
    messages[0]["content"][0].pop("cache_control")
    messages += [
        {"role": "assistant", "content": "A" * 9},
        {"role": "user", "content": [text("R" * 7, MINUTES)]},
    ]
    again = real.messages.create(model=MODEL, max_tokens=2, messages=messages)
    between = 2 + 1 + len("assistant\n") + 9 + 2 + 1 + len("user\n") + 7
    assert usage_of(again) == (between, first, rest)


def test_count_tokens_is_exact_on_a_real_engine(real) -> None:
    messages = [{"role": "user", "content": "how long is this?"}]
    counted = real.messages.count_tokens(model=MODEL, messages=messages)
    message = real.messages.create(model=MODEL, max_tokens=1, messages=messages)
    assert counted.input_tokens == sum(usage_of(message))


def test_no_pin_budget_on_a_real_engine(real) -> None:
    """Half of 64 chunks may be pinned; when they are, requests are served and create nothing."""
    refused = None
    for number in range(20):
        content = f"{number:02}" + "x" * 200
        answer = real.messages.with_raw_response.create(
            model=MODEL,
            max_tokens=1,
            messages=[{"role": "user", "content": [text(content, HOUR)]}],
        )
        if answer.headers["x-chunkllama-cache-pin"] == "over-budget":
            refused = answer.parse()
            break
    assert refused is not None, "twenty prompts of four chunks exceed 32"
    assert usage_of(refused)[0] == 0
    assert sum(usage_of(refused)) > 200
