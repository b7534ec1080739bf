"""Limits: the table, what each answers, and that a setting changes it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chunkllama.sampling_params import SamplingParams
from chunkllama_server.api.common.lark_cost import check_lark_cost, lark_size
from chunkllama_server.api.common.sampling import check_num_logprobs
from chunkllama_server.api.common.schema_cost import check_schema_cost
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.config.settings import Settings
from chunkllama_server.metrics.loop_lag import LoopLag
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError, exceeded

TABLE = {
    key: field.json_schema_extra
    for key, field in Settings.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and "reach" in field.json_schema_extra
}


@pytest.mark.parametrize("key", sorted(TABLE))
def test_every_limit_says_who_reaches_it_and_what_they_get(key: str) -> None:
    extra: Any = TABLE[key]
    assert extra["reach"] in ("anyone", "tenant", "operator")
    assert extra["unit"]
    answer = str(extra["answer"])
    assert re.fullmatch(r"[2-5]\d\d( \w+)?|closed|waits|left out", answer)
    if extra["text"] and key in LimitsConfig.model_fields:
        error = exceeded(DEFAULT_LIMITS, key, "field", value=7)
        assert str(error.status_code) == answer.split()[0]
        assert "{" not in error.message


def test_all_limits_of_the_server_are_in_the_table() -> None:
    assert set(LimitsConfig.model_fields) <= set(TABLE)


@pytest.mark.parametrize(
    ("setting", "fields", "param"),
    [
        ({"max_choices": 2}, {"n": 3}, "n"),
        ({"max_choices": 2}, {"best_of": 3}, "best_of"),
        ({"max_stop_strings": 1}, {"stop": ["a", "b"]}, "stop"),
        ({"max_stop_token_ids": 1}, {"stop_token_ids": [1, 2]}, "stop_token_ids"),
        ({"max_logit_bias": 1}, {"logit_bias": {"1": 1, "2": 1}}, "logit_bias"),
        ({"max_bad_words": 1}, {"bad_words": ["a", "b"]}, "bad_words"),
        ({"max_allowed_token_ids": 1}, {"allowed_token_ids": [1, 2]}, "allowed_token_ids"),
        ({"max_logprobs": 1}, {"logprobs": 2}, "logprobs"),
        ({"max_logprobs": 0}, {"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_answer_logprobs": 23}, {"logprobs": 5, "n": 2}, "logprobs"),
        (
            {"max_answer_logprobs": 23},
            {"prompt": ["ab"] * 9, "prompt_logprobs": 1},
            "prompt_logprobs",
        ),
        ({"max_request_choices": 3}, {"prompt": ["a", "b"], "n": 2}, "prompt"),
        (
            {"max_regex_chars": 2},
            {"structured_outputs": {"regex": "abc"}},
            "structured_outputs.regex",
        ),
        (
            {"max_forced_chars": 2},
            {"structured_outputs": {"choice": ["abc"]}},
            "structured_outputs.choice",
        ),
    ],
)
def test_an_operator_may_allow_less(start_server, setting, fields, param) -> None:
    server = start_server(**setting)
    body = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2}
    refused = server.post("/v1/completions", {**body, **fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert str(next(iter(setting.values()))) in refused.json()["error"]["message"]
    assert server.post("/v1/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("setting", "path", "fields", "name"),
    [
        ({"max_stop_chars": 32}, "/v1/messages", {"stop_sequences": ["a", "b", "c"]},
         "stop_sequences"),
        ({"max_stop_chars": 32}, "/api/chat", {"options": {"stop": "a" * 33}}, "options.stop"),
        ({"max_stop_strings": 1}, "/generate", {"parameters": {"stop": ["a", "b"]}},
         "parameters.stop"),
        ({"max_tools": 1}, "/v1/messages", {"tools": [{"name": "a"}, {"name": "b"}]}, "tools"),
    ],
)  # fmt: skip
def test_an_operator_may_allow_less_of_other_protocols(
    start_server, setting, path, fields, name
) -> None:
    server = start_server(**setting)
    asked = [{"role": "user", "content": "say(ab)yas"}]
    body = {"inputs": "x"} if path == "/generate" else {"model": "alias", "messages": asked}
    if path == "/v1/messages":
        body["max_tokens"] = 9
    refused = server.post(path, {**body, **fields})
    assert refused.status_code in (400, 422)
    assert name in refused.text and str(next(iter(setting.values()))) in refused.text
    assert server.post(path, body).status_code == 200


def test_what_is_streamed_is_not_kept(start_server) -> None:
    server = start_server(max_answer_logprobs=1)
    body = {"model": "alias", "prompt": "say(ab)yas", "max_tokens": 2, "logprobs": 5}
    assert server.post("/v1/completions", {**body, "n": 2, "stream": True}).status_code == 200
    assert server.post("/v1/completions", body).status_code == 200, "the context bounds one"
    chat = {"logprobs": True, "top_logprobs": 5, "max_tokens": 2}
    assert server.chat("say(ab)yas", **chat).status_code == 200
    assert server.chat("say(ab)yas", **chat, n=2).json()["error"]["param"] == "logprobs"


def test_two_choices_without_max_tokens_fit_into_a_large_context() -> None:
    room, prompts = 1 << 17, [[1] * 9]
    check_num_logprobs(prompts, SamplingParams(n=2, logprobs=20), room, DEFAULT_LIMITS)
    for more in (
        SamplingParams(n=8, logprobs=20),
        SamplingParams(n=2, logprobs=20, max_tokens=1 << 15),
    ):
        with pytest.raises(ApiError, match="log-probabilities"):
            check_num_logprobs(prompts, more, room, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"type": "string"}, {"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"oneOf": [{"$ref": "#"}]}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)},
         "$ref": "#/$defs/d0"},
        {"anyOf": [{"anyOf": [{"const": i} for i in range(200)]} for _ in range(60)]},
    ],
)  # fmt: skip
def test_S6_schemas_without_end_are_refused_before_they_are_compiled(schema) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema_cost(schema, "x")
    assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a" * 3000},
        {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        {"$ref": "#"},
    ],
)
def test_S6_a_schema_within_a_grammar_is_charged_as_one(schema) -> None:
    grammar = f'start: "a" b\nb: %json  {json.dumps(schema)}\n'
    with pytest.raises(ApiError) as caught:
        check_lark_cost(grammar, "x")
    assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")
    check_lark_cost('start: %json {"type": "string"} "%json {"', "x")


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "string", "allOf": list(parts)}


@pytest.mark.parametrize(
    "schema",
    [
        joined(*({"pattern": f"a{{{i}}}"} for i in range(30))),
        joined(joined(*({"pattern": f"a{i}"} for i in range(5))), joined({"format": "uuid"}),
               {"oneOf": [{"type": "null"}, {"minLength": 1, "maxLength": 9, "pattern": "b"}]}),
        {"items": [{"additionalProperties": joined(*[{"minLength": 2}] * 9)}]},
        {"$defs": {"a": joined(*[{"$ref": "#/$defs/b"}] * 3),
                   "b": joined(*({"pattern": f"x{i}"} for i in range(3)))}},
        {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        {"patternProperties": {f"^x{i}": {"type": "string"} for i in range(65)}},
    ],
)  # fmt: skip
def test_S6_what_would_be_joined_without_end_is_refused_before_it_is_compiled(schema) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema_cost(schema, "x")
    assert (caught.value.status_code, caught.value.code) == (400, "grammar_too_complex")


@pytest.mark.parametrize(
    "schema",
    [
        joined({"pattern": "^a"}, {"minLength": 1}, {"maxLength": 9}, {"format": "uuid"}),
        {"properties": {f"p{i}": {"pattern": f"^{i}"} for i in range(50)}},
        {"anyOf": [{"pattern": f"^{i}"} for i in range(50)]},
        {"type": "integer", "multipleOf": 5, "minimum": 0},
        {"properties": {name: {"type": "string"} for name in
                        ("pattern", "format", "minLength", "maxLength", "multipleOf")}},
        {"patternProperties": {f"^x{i}": {"type": "string"} for i in range(64)}},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"properties": {"next": {"$ref": "#"}}},
        {"items": {"$ref": "#"}},
        {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(50)},
         "$ref": "#/$defs/d0"},
    ],
)  # fmt: skip
def test_recursive_schemas_that_end_are_not(schema) -> None:
    check_schema_cost(schema, "x")


def test_strings_that_do_not_end_are_read_once() -> None:
    """With a scan from every quote these would take hours; the test would not end."""
    with pytest.raises(ApiError, match="arrays and objects"):
        parse_json(b"[" * 40_000 + b'"' + b'\\"' * 900_000)
    more = LimitsConfig(max_json_containers=50_000)
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(b"[" * 40_000 + b'"' + b'\\"' * 1000, limits=more)
    assert lark_size('start: "' + '\\"' * 400_000)[0] > 0
    assert lark_size("start: /" + "\\/" * 400_000)[0] > 0
    assert lark_size("start: " + '"\\' * 400_000)[0] > 0


def test_the_options_of_a_lark_definition_are_read_once() -> None:
    """They are read from the last to the first, and count as text of the body."""
    options = '"ab"]' * 40_000
    assert lark_size(f'start[{options}: "c"')[0] == 160_003


class _Loop:
    """An event loop whose time a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, ring: Any) -> Any:
        when = self.now + seconds
        self.due.append((when, ring))
        handle: Any = asyncio.TimerHandle.__new__(asyncio.TimerHandle)
        handle._when = when
        return handle

    def run_at(self, now: float) -> None:
        self.now = now
        _, ring = self.due.pop()
        ring()


def test_the_loops_lag_is_the_largest_of_a_minute() -> None:
    registry, loop = CollectorRegistry(), _Loop()
    lag = LoopLag(registry)

    def gauge() -> float | None:
        return registry.get_sample_value("chunkllama_event_loop_lag_seconds")

    assert gauge() == 0.0
    lag.start(loop)  # type: ignore[arg-type]
    loop.run_at(100.6)
    assert gauge() == pytest.approx(0.5)
    loop.run_at(100.9)
    assert gauge() == pytest.approx(0.5), "a smaller delay does not hide it"
    loop.now = 103.0
    assert gauge() == pytest.approx(2.0), "a loop that is away now"
    loop.now = 101.0
    loop.run_at(101.0)
    loop.run_at(170.0)
    loop.run_at(170.1)
    assert gauge() == pytest.approx(68.9)
    loop.run_at(290.0)
    assert gauge() == pytest.approx(119.8)


def test_the_lag_is_exported(server) -> None:
    with server.http() as http:
        assert "chunkllama_event_loop_lag_seconds " in http.get("/metrics").text
