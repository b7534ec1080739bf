"""The HTTP contract on the real engine: constrained output, forced calls, streams, the cache."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def text(length: int, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": length, **more}


def integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: dict[str, Any], low: int, high: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


BOOLEAN = {"type": "boolean"}
SCHEMAS: list[dict[str, Any]] = [
    record(name=text(20), age=integer(0, 120)),
    record(city=text(20), country=text(20), capital=BOOLEAN),
    array(text(12), 1, 4),
    {"enum": ["red", "green", "blue"]},
    integer(-5, 5),
    BOOLEAN,
    record(kind={"const": "point"}, x=integer(0, 999), y=integer(0, 999)),
    record(tags=array({"enum": ["a", "b", "c"]}, 0, 3)),
    {"anyOf": [record(a=text(8)), record(b=integer(0, 99))]},
    record(person=record(first=text(12), last=text(12)), zip=text(5, pattern="^[0-9]{5}$")),
    {"$defs": {"p": record(x=integer(0, 9))}, **array({"$ref": "#/$defs/p"}, 2, 2)},
    record(date=text(10, pattern="^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")),
    record(ok=BOOLEAN, reason=text(30)),
    {"type": "null"},
    record(score=integer(1, 10), comment=text(25)),
    array(array(integer(0, 9), 2, 2), 1, 3),
    record(status={"enum": ["open", "closed"]}, id=integer(1, 99999)),
    text(15, minLength=1),
    {"type": "object", "properties": {"a": text(6), "b": text(6)}, "additionalProperties": False},
    record(q=text(20), options=array(text(8), 2, 3), answer=integer(0, 2)),
]


@pytest.fixture(scope="module")
def client(demo):
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key="x", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def model(client) -> str:
    return client.models.list().data[0].id


def answer_in(client, model: str, number: int) -> None:
    schema = SCHEMAS[number % len(SCHEMAS)]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Answer in JSON with something plausible."}],
        temperature=1,
        seed=number,
        max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    ).choices[0]
    assert answer.finish_reason == "stop", (schema, answer.message.content)
    jsonschema_rs.validate(schema, json.loads(answer.message.content))


@pytest.mark.parametrize(
    "count", [20, pytest.param(200, marks=pytest.mark.nightly)], ids=["20", "200"]
)
def test_json_schema_answers_end_and_validate(client, model, count):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: answer_in(client, model, number), range(count)))


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "[A-Z][a-z]{2,5}-[0-9]{3}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "<" /[a-z]{1,4}/ ">"'},
    ],
)
def test_other_constraints(client, model, outputs):
    choice = client.chat.completions.create(
        model=model, messages=FRANCE, seed=1, extra_body={"structured_outputs": outputs}
    ).choices[0]
    assert choice.finish_reason == "stop"
    said = choice.message.content
    assert said in ("yes", "no") or (said[0] + said[-1] == "<>") or said[-4] == "-"


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "(.{1,9999}){9999}"},
        {"regex": "((a|b){1,999}c){1,999}"},
        {"json": {"$ref": "#"}},
        {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#"}]}}, "allOf": [{"$ref": "#/$defs/a"}]}},
        {"grammar": 'start: ("a"~1..999 "b")~1..999 x\nx: /c/~1..99'},
    ],
)
def test_grammars_no_engine_could_run_are_400(client, model, grammar):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model, messages=FRANCE, extra_body={"structured_outputs": grammar}
        )
    assert caught.value.code == "grammar_too_complex"


def test_forced_tool_call(client, model):
    parameters = record(city=text(20))
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    choice = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        seed=3,
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0].function
    assert call.name == "get_weather"
    jsonschema_rs.validate(parameters, json.loads(call.arguments))


def test_stream_and_whole_agree(client, model):
    options = {"model": model, "messages": FRANCE, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    response = client.responses.create(
        model=model, input=FRANCE[0]["content"], temperature=0, max_output_tokens=24
    )
    assert response.output_text == whole


def test_scoring_equals_generation(client, model):
    """The log-probability of a token is the same whether it was drawn or given."""
    drawn = client.completions.create(
        model=model,
        prompt="The capital of France is",
        temperature=0,
        max_tokens=4,
        logprobs=0,
        extra_body={"return_token_ids": True},
    ).choices[0]
    given = client.completions.create(
        model=model,
        prompt=[*drawn.prompt_token_ids, *drawn.token_ids],
        max_tokens=0,
        echo=True,
        logprobs=0,
    ).choices[0]
    assert given.logprobs.tokens[-4:] == drawn.logprobs.tokens
    for mine, theirs in zip(
        given.logprobs.token_logprobs[-4:], drawn.logprobs.token_logprobs, strict=True
    ):
        assert mine == pytest.approx(theirs, abs=0.15), "bf16 rounds differently in a batch"


def test_embeddings_tell_texts_apart(client, model):
    texts = ["The cat sleeps.", "A cat is asleep.", "Interest rates rose by two percent."]
    vectors = [e.embedding for e in client.embeddings.create(model=model, input=texts).data]

    def similarity(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert all(similarity(v, v) == pytest.approx(1.0, abs=1e-3) for v in vectors)
    assert similarity(vectors[0], vectors[1]) > similarity(vectors[0], vectors[2])


def test_previous_response_is_found_in_the_cache(client, model):
    first = client.responses.create(
        model=model, input="Tell me about Paris. " * 20, max_output_tokens=16, temperature=0
    )
    second = client.responses.create(
        model=model, input="Go on.", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1


def test_breakpoint_limits_what_is_stored(client, model):
    stable = "These are the rules of the house. " * 12

    def ask(tail: str) -> Any:
        parts = [
            {"type": "text", "text": stable, "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "text", "text": tail},
        ]
        return client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": parts}],
            max_tokens=1,
            extra_body={"prompt_cache_options": {"mode": "explicit"}, "cache_salt": "breakpoint"},
        ).usage

    tail = "A question of some length that must not be kept. " * 12
    first, second = ask(tail), ask(tail)
    details = first.prompt_tokens_details
    # The template's own system message is public, and may be there already.
    assert details.cached_tokens < 30
    stored = details.cached_tokens + details.cache_write_tokens
    assert 30 < stored < first.prompt_tokens / 2 + 40
    assert second.prompt_tokens_details.cached_tokens == stored


def test_disconnect_frees_chunks(demo, client, model):
    stream = client.chat.completions.create(
        model=model, messages=FRANCE, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        metrics = httpx.get(f"{demo.url}/metrics").text
        if 'kv_chunks{state="referenced"} 0.0' in metrics and "requests_live 0.0" in metrics:
            return
        time.sleep(0.02)
    raise AssertionError("chunks of a closed stream are still referenced")
