"""Ollama's API by its own client: chat, generate, streams, tools, formats, embeddings, errors."""

from __future__ import annotations

import json

import ollama
import pytest
from fake_engine import DURATIONS, MODEL

from chunkllama.errors import RequestFailedError

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def sdk(server, **headers: str) -> ollama.Client:
    return ollama.Client(host=server.url, headers=headers, verify=False)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": f"say({text})yas"}]


def lines(response) -> list[dict]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def prompt_of(server, text_parts) -> str:
    ids = server.engine.requests[-1].prompt_token_ids
    return text_parts[0].decode(ids, skip_special_tokens=False)


def test_chat(server) -> None:
    answer = sdk(server).chat(MODEL, say("hi there"))
    assert answer.message.content == "hi there"
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count == len(server.engine.requests[-1].prompt_token_ids)
    assert answer.eval_count == len("hi there") + 1
    assert answer.total_duration > 0


@pytest.mark.parametrize("stream", [False, True])
def test_durations_are_the_engines(server, stream) -> None:
    _, prefill, per_delta = DURATIONS
    body = {"model": MODEL, "messages": say("hi there"), "stream": stream}
    response = server.post("/api/chat", body)
    last = lines(response)[-1] if stream else response.json()
    assert last["prompt_eval_duration"] == int(prefill * 1e9)
    assert last["eval_duration"] == int(len("hi there") * per_delta * 1e9)


def test_a_stream_is_the_default(server) -> None:
    parts = lines(server.post("/api/chat", {"model": MODEL, "messages": say("hi there")}))
    assert "".join(part["message"]["content"] for part in parts) == "hi there"
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    streamed = sdk(server).chat(MODEL, say("hi there"), stream=True)
    assert "".join(part.message.content for part in streamed) == "hi there"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_loop(server, text_parts, stream) -> None:
    client = sdk(server)
    asked = say(f"Look. {CALL}{CALL}")
    parts = client.chat(MODEL, asked, tools=[TOOL], stream=stream)
    messages = [part.message for part in parts] if stream else [parts.message]
    calls = [call for message in messages for call in message.tool_calls or ()]
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("weather", {"city": "Paris"})
    ] * 2
    assert "".join(message.content for message in messages).strip() == "Look."
    answer = {"role": "assistant", "content": "", "tool_calls": [c.model_dump() for c in calls]}
    result = {"role": "tool", "content": "rain", "tool_name": "weather"}
    done = client.chat(MODEL, [*asked, answer, result, *say("wet")], tools=[TOOL])
    assert done.message.content == "wet"
    prompt = prompt_of(server, text_parts)
    assert 'weather{"city": "Paris"}' in prompt and "tool\nrain<|im_end|>" in prompt


def test_generate(server, text_parts) -> None:
    answer = sdk(server).generate(MODEL, "say(hi)yas", system="be brief")
    assert answer.response == "hi"
    assert prompt_of(server, text_parts).startswith("<|im_start|>system\nbe brief<|im_end|>")
    streamed = sdk(server).generate(MODEL, "say(hi)yas", stream=True)
    assert "".join(part.response for part in streamed) == "hi"


def test_a_raw_prompt_is_continued(server, text_parts) -> None:
    assert sdk(server).generate(MODEL, "say(hi)yas", raw=True).response == "hi"
    assert prompt_of(server, text_parts) == "say(hi)yas"


def test_without_a_prompt_the_model_is_loaded(server) -> None:
    assert sdk(server).generate(MODEL).done_reason == "load"
    assert sdk(server).chat(MODEL, []).done_reason == "load"
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [(0, "unload"), (0.0, "unload"), ("0", "unload"), ("0s", "unload"), ("0m0s", "unload"),
     (-1, "load"), ("5m", "load"), ("10s", "load"), (300, "load"), ("0" * 99 + "x", "load")],
)  # fmt: skip
def test_a_time_of_none_without_a_prompt_unloads(server, keep_alive, reason) -> None:
    client = sdk(server)
    assert client.generate(MODEL, keep_alive=keep_alive).done_reason == reason
    assert client.chat(MODEL, [], keep_alive=keep_alive).done_reason == reason
    assert client.chat(MODEL, say("hi"), keep_alive=keep_alive).message.content == "hi"


def test_a_last_message_of_the_assistant_is_continued(server, text_parts) -> None:
    asked = say("B)")
    begun = {"role": "assistant", "content": "The answer is ("}
    assert sdk(server).chat(MODEL, [*asked, begun]).message.content == "B)"
    assert prompt_of(server, text_parts).endswith("assistant\nThe answer is (")
    sdk(server).chat(MODEL, asked)
    plain = prompt_of(server, text_parts)
    sdk(server).chat(MODEL, [*asked, {"role": "assistant", "content": ""}])
    assert prompt_of(server, text_parts) == plain
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    sdk(server).chat(MODEL, [*asked, called])
    assert prompt_of(server, text_parts).endswith("<|im_start|>assistant\n")


def test_an_image_in_a_result_is_named_in_the_prompt(server, text_parts) -> None:
    result = {"role": "tool", "content": "", "tool_name": "f", "images": ["aGk="]}
    response = server.post("/api/chat", {"model": MODEL, "messages": [*say("a"), result]})
    assert response.headers["x-chunkllama-repaired-history"] == "messages[1].images"
    assert "tool\n[image]<|im_end|>" in prompt_of(server, text_parts)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("think", "end"),
    [(True, "[medium]"), (False, "</think>\n\n"), (None, "assistant\n"), ("low", "[low]"),
     ("high", "[high]")],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "generate"])
def test_think(start_server, text_parts, think, end, path) -> None:
    server = start_server(template_source=THINKS)
    said = "say(hm)yas" if think in (None, False) else "say(<think>so</think>hm)yas"
    if path == "chat":
        answer = sdk(server).chat(MODEL, [{"role": "user", "content": said}], think=think).message
        text = answer.content
    else:
        answer = sdk(server).generate(MODEL, said, think=think)
        text = answer.response
    assert text == "hm"
    assert answer.thinking == (None if think in (None, False) else "so")
    assert prompt_of(server, text_parts).endswith(end)
    assert "thinking" in sdk(server).show(MODEL).capabilities


@pytest.mark.parametrize("think", [True, "low"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_model_without_thoughts_is_not_asked_to_think(server, path, think) -> None:
    body = {"model": MODEL, "messages": say("a"), "prompt": "a", "think": think}
    body.pop("prompt" if path == "/api/chat" else "messages")
    refused = server.post(path, body)
    assert refused.status_code == 400
    assert "does not support thinking" in refused.json()["error"]
    assert server.post(path, {**body, "think": False}).status_code == 200


@pytest.mark.parametrize(
    ("options", "reads", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_k": 7}, "top_k", 7),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"min_p": 0.125}, "min_p", 0.125),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", None),
        ({"seed": -2}, "seed", -2),
        ({"stop": [*"ABCDEFGH"]}, "stop", tuple("ABCDEFGH")),
        ({"stop": ["x"]}, "stop", ("x",)),
        ({"num_predict": 5}, "max_tokens", 5),
        ({"repeat_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"presence_penalty": 1.5}, "presence_penalty", 1.5),
        ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_options(server, options, reads, value, raw) -> None:
    sdk(server).generate(MODEL, "say(a)yas", options=options, raw=raw)
    assert getattr(server.engine.requests[-1].sampling, reads) == value


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@pytest.mark.parametrize(
    ("model", "options", "values"),
    [
        ({}, {}, (0.8, 40, 0.9, 0.0, 1.0)),
        ({"temperature": 0.25, "top_p": 1.0}, {}, (0.25, 40, 1.0, 0.0, 1.0)),
        ({"top_k": 0, "repetition_penalty": 1.25}, {}, (0.8, 0, 0.9, 0.0, 1.25)),
        ({"temperature": 0.25}, {"temperature": 1.5}, (1.5, 40, 0.9, 0.0, 1.0)),
        ({}, {"temperature": 0, "top_k": 0, "top_p": 1}, (0.0, 0, 1.0, 0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("path", ["chat", "generate", "raw"])
def test_defaults_are_the_models_else_ollamas(start_server, path, model, options, values) -> None:
    server = start_server(generation_defaults=model)
    if path == "chat":
        sdk(server).chat(MODEL, say("a"), options=options)
    else:
        sdk(server).generate(MODEL, "say(a)yas", raw=path == "raw", options=options)
    sampling = server.engine.requests[-1].sampling
    assert tuple(getattr(sampling, name) for name in SAMPLING) == values
    assert server.chat().status_code == 200  # OpenAI's API has its own
    other = server.engine.requests[-1].sampling
    assert other.temperature == model.get("temperature", 1.0)


@pytest.mark.parametrize("limit", [-2, -1, 0, 10**6])
@pytest.mark.parametrize("raw", [False, True])
def test_no_limit_is_what_fits(server, limit, raw) -> None:
    answer = sdk(server).generate(MODEL, "say(abc)yas", options={"num_predict": limit}, raw=raw)
    assert answer.response == "abc"


def test_an_answer_as_long_as_its_limit(server) -> None:
    answer = sdk(server).generate(MODEL, "say(abcdef)yas", options={"num_predict": 3})
    assert (answer.response, answer.done_reason) == ("abc", "length")


def test_settings_of_the_server_are_harmless(server) -> None:
    body = {
        "model": MODEL,
        "messages": say("a"),
        "keep_alive": "5m",
        "options": {"num_ctx": 4096, "num_gpu": 1, "mirostat": 0, "repeat_last_n": 64},
    }
    response = server.post("/api/chat", body)
    assert response.status_code == 200
    assert response.headers["x-chunkllama-ignored-fields"] == "options.repeat_last_n"


@pytest.mark.parametrize(
    ("given", "kind"), [("json", "json_object"), ({"type": "object", "title": "t"}, "json_schema")]
)
def test_formats(server, given, kind) -> None:
    sdk(server).chat(MODEL, say("a"), format=given)
    assert server.engine.requests[-1].sampling.grammar.kind == kind


def test_what_a_format_cannot_mean_is_named_by_the_clients_name(server) -> None:
    answer = server.post("/api/chat", {"model": MODEL, "messages": say("a"), "stream": False,
                                       "format": {"type": "number-like"}})  # fmt: skip
    assert answer.headers["x-chunkllama-ignored-fields"] == "format.type"


def test_embeddings(server) -> None:
    client = sdk(server)
    one = client.embed(MODEL, "abc")
    assert one.embeddings == [[0.6, 0.8, *[0.0] * 6]]
    assert one.prompt_eval_count == 3
    assert len(client.embed(MODEL, ["a", "b"]).embeddings) == 2
    assert client.embed(MODEL, "").embeddings == client.embed(MODEL, []).embeddings == []
    assert len(client.embed(MODEL, "abc", dimensions=2).embeddings[0]) == 2
    assert len(client.embed(MODEL, "x" * 5000).embeddings) == 1
    former = client.embeddings(MODEL, "abc").embedding
    assert list(former) == [3.0, 4.0, *[0.0] * 6], "as the model has it"
    assert list(client.embeddings(MODEL).embedding) == []
    with pytest.raises(ollama.ResponseError):
        client.embed(MODEL, "x" * 5000, truncate=False)


def test_models(server) -> None:
    client = sdk(server)
    assert [model.model for model in client.list().models] == [MODEL, "alias"]
    running = client.ps().models
    assert [model.model for model in running] == [MODEL, "alias"]
    assert {(model.context_length, model.size_vram) for model in running} == {(2048, 0)}
    assert running[0].expires_at.year == 9999
    shown = client.show(MODEL)
    assert shown.modelinfo["llama.context_length"] == 2048
    assert {"completion", "embedding", "tools"} <= set(shown.capabilities)
    with server.http() as http:
        version = http.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 13, 4), "what clients ask for"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_ollamas_command_finds_the_server(server, start_server, method) -> None:
    with server.http() as http:
        response = http.request(method, "/")
        assert response.status_code == 200
        assert response.text == ("Ollama is running" if method == "GET" else "")
        assert http.post("/", json={"inputs": "say(hi)yas"}).json()[0]["generated_text"] == "hi"
        for headers, is_page in (
            ({"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, True),
            ({"accept": "*/*", "sec-fetch-mode": "navigate"}, True),
            ({"accept": "text/html,application/xhtml+xml", "sec-fetch-mode": "cors"}, False),
            ({"accept": "text/html,*/*;q=0.8"}, False),  # of a program
        ):
            answer = http.request(method, "/", headers=headers)
            assert answer.headers.get("location") == ("dashboard" if is_page else None)
            assert answer.status_code == (307 if is_page else 200)
            assert answer.headers["vary"] == "accept, sec-fetch-mode"
    with start_server(protocols="tgi").http() as http:
        assert http.request(method, "/").status_code == 405


def test_a_tag_of_the_name_is_ignored(server) -> None:
    assert sdk(server).chat("alias:latest", say("hi")).message.content == "hi"


INVALID = [
    ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
     "messages[0].images"),
    ("/api/chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("/api/chat", {"messages": say("a"), "options": {"num_predict": "x"}}, "options.num_predict"),
    ("/api/chat", {"messages": say("a"), "options": {"temperature": 9}}, "options.temperature"),
    ("/api/generate", {"prompt": "x", "images": ["aGk="]}, "images"),
    ("/api/generate", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/api/generate", {"prompt": "x", "template": "y"}, "template"),
    ("/api/generate", {"prompt": "x", "context": [1, 2]}, "context"),
    ("/api/generate", {"prompt": "x" * 3000}, "prompt"),
    ("/api/chat", {"messages": say("a"), "options": {"stop": ["x"] * 65}}, "options.stop"),
    ("/api/chat", {"messages": say("a"), "tools": [TOOL] * 1025}, "tools"),
    ("/api/chat", {"messages": [{"role": "assistant", "content": ""}]}, "messages"),
    (
        "/api/chat",
        {"messages": [{"role": "user", "content": "x", "images": ["aGk="]},
                      {"role": "assistant", "content": "a"}]},
        "messages[0].images",
    ),
    ("/api/embed", {}, "input"),
    ("/api/chat", {"messages": say("a"), "format": "xml"}, "'json' or an object"),
    ("/api/chat", {"messages": say("a"), "think": "x"}, "'medium' or 'high' or a valid boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "name"), INVALID)
def test_invalid_requests_name_the_field(server, path, fields, name) -> None:
    response = server.post(path, {"model": MODEL, **fields})
    assert response.status_code == 400, response.text
    assert set(response.json()) == {"error"}
    assert name in response.json()["error"]


def test_errors_by_the_client(server, start_server) -> None:
    with pytest.raises(ollama.ResponseError) as missing:
        sdk(server).chat("nothing", say("a"))
    assert missing.value.status_code == 404
    server.engine.fail_after = (2, RequestFailedError("boom", "model_nan"))
    with pytest.raises(ollama.ResponseError):
        list(sdk(server).chat(MODEL, say("abcdef"), stream=True))
    guarded = start_server(api_keys={"a": "ka"})
    with pytest.raises(ollama.ResponseError) as refused:
        sdk(guarded).chat(MODEL, say("a"))
    assert refused.value.status_code == 401
    assert sdk(guarded, Authorization="Bearer ka").chat(MODEL, say("a")).message.content == "a"
