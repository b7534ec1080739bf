"""Every row of the dialect table over HTTP: what a name of another server does here."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from dialect_helpers import BODIES, FUNCTION, GBNF, JSON, PATHS, REGEX, SCHEMA, THINKS, read, run
from fake_engine import MODEL

from chunkllama_server.api.dialect.meanings import REPETITION_NAMES, Endpoint
from chunkllama_server.api.dialect.route import MODELS
from chunkllama_server.api.dialect.row import Row
from chunkllama_server.api.dialect.table import CONTAINERS, TABLE
from chunkllama_server.api.dialect.translate import looks_binding
from chunkllama_server.transport.errors import ApiError

# First name of a translated row -> a value, and own fields that mean the same.
MEANINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "guided_json": (SCHEMA, JSON),
    "guided_regex": ("[0-9]{3}", REGEX),
    "guided_choice": (["a", "b"], {"structured_outputs": {"choice": ["a", "b"]}}),
    "guided_grammar": (GBNF, {"structured_outputs": {"grammar": GBNF}}),
    "guided_json_object": (True, {"structured_outputs": {"json_object": True}}),
    "grammar": ({"type": "json", "value": SCHEMA}, JSON),
    "format": (SCHEMA, JSON),
    "response_format": (
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    "text": (
        {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    "n_predict": (20, {"max_tokens": 20}),
    "max_thinking_tokens": (5, {"thinking_token_budget": 5}),
    "min_new_tokens": (3, {"min_tokens": 3}),
    "stop_sequences": (["x"], {"stop": ["x"]}),
    "no_stop_trim": (True, {"include_stop_str_in_output": True}),
    "truncate": (1, {"truncate_prompt_tokens": 1}),
    "n_cmpl": (2, {"n": 2}),
    "repeat_penalty": (1.25, {"repetition_penalty": 1.25}),
    "topP": (0.5, {"top_p": 0.5}),
    "topK": (7, {"top_k": 7}),
    "random_seed": (7, {"seed": 7}),
    "do_sample": (False, {"temperature": 0}),
    "greed_sampling": (True, {"temperature": 0}),
    "n_probs": (2, {"logprobs": True, "top_logprobs": 2}),
    "extra_key": ("k", {"cache_salt": "k"}),
    "inputs": ("ho", {"prompt": "ho"}),
    "return_full_text": (True, {"echo": True}),
    "enable_thinking": (False, THINKS),
    "reasoning": ({"enabled": False}, THINKS),
    "reasoning_effort": ("low", {"reasoning": {"effort": "low"}}),
    "response_mime_type": ("application/json", {"structured_outputs": {"json_object": True}}),
    "output_config": (
        {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        {
            "reasoning_effort": "low",
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
    ),
    "ban_eos_token": (True, {"ignore_eos": True}),
    "banned_strings": (["x"], {"bad_words": ["x"]}),
    "thinking_config": ({"thinkingBudget": 5}, {"thinking_token_budget": 5}),
    "template_vars": (THINKS["chat_template_kwargs"], THINKS),
    "continue_": (True, {"continue_final_message": True, "add_generation_prompt": False}),
    "suppress_tokens": ([5, 6], {"logit_bias": {"5": -100, "6": -100}}),
    "toolChoice": ({"type": "none"}, {"tool_choice": "none"}),
    "add_special": (False, {"add_special_tokens": False}),
    "with_pieces": (True, {"return_token_strs": True}),
}
COMPLETION_LOGPROBS = {"logprobs": 2}


def names_at(row: Row, endpoint: Endpoint) -> list[str]:
    """The row's names that are not fields of the endpoint itself."""
    return [name for name in row.names if name not in MODELS[endpoint].wire_names()]


def label(value: Any) -> str:
    return value if isinstance(value, str) else value.names[0]


def meaning_of(row: Row, endpoint: Endpoint) -> tuple[Any, dict[str, Any]]:
    if row.names[0] == "content":
        return "ho", {"input" if endpoint == "embeddings" else "prompt": "ho"}
    value, means = MEANINGS[row.names[0]]
    if row.names[0] == "n_probs" and endpoint == "completions":
        means = COMPLETION_LOGPROBS
    if endpoint == "responses" and row.names[0] == "output_config":
        given = means["response_format"]["json_schema"]
        text = {"format": {"type": "json_schema", "schema": given["schema"]}}
        means = {"text": text, "reasoning": {"effort": "low"}}
    if endpoint == "responses" and "max_tokens" in means:
        means = {"max_output_tokens": means["max_tokens"]}
    return value, means


TRANSLATED = [(row, endpoint) for row in TABLE for endpoint in row.endpoints
              if row.handling == "translated" and names_at(row, endpoint)]  # fmt: skip


@pytest.mark.parametrize(("row", "endpoint"), TRANSLATED, ids=label)
def test_a_translated_name_does_what_it_means(server, row, endpoint):
    names = names_at(row, endpoint)
    value, means = meaning_of(row, endpoint)
    bodies = [read(endpoint, {name: value}).body for name in names]
    assert bodies == [bodies[0]] * len(names)
    if row.names[0] in (
        "max_thinking_tokens",
        "thinking_config",
    ):  # the test's model has no thoughts
        assert bodies[0] == means
        return
    expected = run(server, endpoint, means)
    assert run(server, endpoint, {names[0]: value}) == expected
    is_shown = row.names[0] not in (
        "enable_thinking", "reasoning", "reasoning_effort", "return_full_text", "add_special",
        "toolChoice", "template_vars",
    )  # fmt: skip
    assert (expected != run(server, endpoint, {})) is is_shown or endpoint == "embeddings"


def by_handling(handling: str) -> list[Row]:
    return [row for row in TABLE if row.handling == handling]


@pytest.mark.parametrize("row", by_handling("refused"), ids=label)
def test_refused_names_are_named_and_values_that_ask_for_nothing_pass(row):
    for endpoint in row.endpoints:
        rest = {} if endpoint == "embeddings" else {"repetition_penalty": 1.5}
        for name in names_at(row, endpoint):
            with pytest.raises(ApiError) as caught:
                read(endpoint, {name: 0.5, **rest})
            assert (caught.value.param, caught.value.code) == (name, "unsupported")
            assert row.note in caught.value.message
            for value in (None, *row.off):
                nothing = read(endpoint, {name: value, **rest})
                assert nothing.body == rest
                assert not nothing.harmless + nothing.unknown


@pytest.mark.parametrize("row", by_handling("harmless"), ids=label)
def test_harmless_names_are_listed(row):
    for endpoint in row.endpoints:
        for name in names_at(row, endpoint):
            assert read(endpoint, {name: 0.5}).harmless == [name]


def test_a_refusal_over_http(server):
    error = server.chat(mirostat=2).json()["error"]
    assert (error["param"], error["code"]) == ("mirostat", "unsupported")
    assert not server.engine.requests
    assert server.chat(mirostat=0).status_code == 200


def test_a_harmless_name_is_in_the_header_in_strict_mode_too(server, strict_server):
    for one in (server, strict_server):
        response = one.chat(id_slot=2)
        assert response.status_code == 200, response.text
        assert response.headers["x-chunkllama-ignored-fields"] == "id_slot"


@pytest.fixture(scope="module")
def strict_server(start_server):
    return start_server(strict=True)


def test_each_name_has_one_row_at_each_endpoint():
    for endpoint in get_args(Endpoint):
        names = [name for row in TABLE if endpoint in row.endpoints for name in row.names]
        assert len(names) == len(set(names)), endpoint


@pytest.mark.parametrize("container", CONTAINERS)
def test_members_of_a_container_count_as_fields(server, container):
    inner = {"max_new_tokens": 5, "top_k": 7, "guided_regex": "[0-9]{3}", "nothing": 1}
    response = server.chat(**{container: inner})
    assert response.status_code == 200, response.text
    assert response.headers["x-chunkllama-ignored-fields"] == f"{container}.nothing"
    sampling = server.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.top_k) == (5, 7)
    assert sampling.grammar.kind == "regex"
    error = server.chat(**{container: {"mirostat": 2}}).json()["error"]
    assert error["param"] == f"{container}.mirostat"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n_predict": 0}, "n_predict"),
        ({"n_predict": "five"}, "n_predict"),
        ({"options": {"num_predict": 10**6}}, "options.num_predict"),
        ({"nvext": {"top_k": "x"}}, "nvext.top_k"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "REFUSE"}, "guided_regex"),
        ({"response_format": {"type": "json", "value": {"enum": ["REFUSE"]}, "strict": True}},
         "response_format.value.enum"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": {"properties": {"a": {"enum": ["REFUSE"]}}},
                     "strict": True}], "tool_choice": "any"},
         "tools[0].input_schema.properties.a.enum"),
        ({"n_predict": 5, "max_tokens": 6}, "n_predict"),
        ({"n_predict": 5, "max_new_tokens": 6}, "max_new_tokens"),
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"regex": "a", "guided_regex": "b"}, "guided_regex"),
        ({"do_sample": "no"}, "do_sample"),
        ({"format": "yaml"}, "format"),
        ({"grammar": {"type": "yaml", "value": "x"}}, "grammar"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking"),
        ({"thinking": {"type": "perhaps"}}, "thinking"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
         "structured_outputs.whitespace_pattern"),
        ({"response_format": {"type": "json_object", "max_length": 5}},
         "response_format.max_length"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": True}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": [{}]}},
         "response_format.json_schema"),
        ({"logit_bias": [[1]]}, "logit_bias[0]"),
        ({"output_schema": {"type": "object"}}, "output_schema"),
        ({"max_answer_tokens": 5}, "max_answer_tokens"),
        ({"topic_penalty": 0.5}, "topic_penalty"),
        ({"extra_body": {"bannedStrings": ["a"]}}, "extra_body.bannedStrings"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_use_the_clients_names(server, fields, param):
    response = server.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert not server.engine.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"n_predict": -1},
        {"options": {"num_predict": -2}},
        {"grammar": ""},
        {"format": ""},
        {"seed": None, "sampling_seed": -1},
        {"mood": 1, "schema": None},
    ],
    ids=str,
)
def test_no_limit_and_no_constraint_are_none(server, fields):
    plain = run(server, "chat", {})
    response = server.chat("hi", **fields)
    assert response.status_code == 200, response.text
    assert server.engine.requests[-1].sampling == plain[1]


BOTH = [
    ({"n_predict": 5, "max_tokens": 5}, {"max_tokens": 5}),
    ({"stop": ["a", "b"], "stopping_strings": ["b", "a"]}, {"stop": ["a", "b"]}),
    ({"stop": "a", "stop_sequences": ["a"]}, {"stop": ["a"]}),
    ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, JSON),
    ({"guided_json": SCHEMA, "json_mode": True}, JSON),
    ({"guided_json": SCHEMA, "response_format": SCHEMA}, JSON),
    ({"generation_config": {"responseMimeType": "application/json", "responseSchema": SCHEMA}},
     JSON),
    ({"functions": [FUNCTION], "tools": [{"type": "function", "function": FUNCTION}]},
     {"functions": [FUNCTION]}),
    ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False}}, THINKS),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "means"), BOTH, ids=str)
def test_the_same_meaning_by_two_names_is_no_contradiction(server, fields, means):
    assert run(server, "chat", fields) == run(server, "chat", means)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n_predict": 5}, 200),
        ({"n_predict": "five"}, 400),
        ({"n_predict": 5, "max_tokens": 6}, 400),
        ({"guided_regex": 5}, 400),
        ({"max_answer_tokens": 5}, 400),
        ({"mood": 1}, 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_render_reads_the_names_of_its_endpoint(server, endpoint, fields, status):
    body = {"model": MODEL, **BODIES[endpoint], **fields}
    answers = [server.post(PATHS[endpoint] + end, body) for end in ("", "/render")]
    assert [answer.status_code for answer in answers] == [status] * 2
    served, rendered = (answer.json().get("error") if status == 400 else None for answer in answers)
    assert served == rendered


@pytest.mark.parametrize("name", ["repetition_penalty", *REPETITION_NAMES.split()])
def test_a_window_is_refused_beside_a_penalty_of_any_name(server, name):
    assert server.chat(rep_pen_range=64, **{name: 1}).status_code == 200
    error = server.chat(rep_pen_range=64, **{name: 1.2}).json()["error"]
    assert error["param"] == "rep_pen_range"


def test_an_empty_text_is_absent(server):
    """All translated names but those of a prompt, which may be empty."""
    for row, endpoint in TRANSLATED:
        names = [name for name in names_at(row, endpoint) if name not in ("inputs", "content")]
        for name in names:
            assert not read(endpoint, {name: ""}).body, name
    names = ("regex_pattern", "banned_strings", "thinking_config", "ban_eos_token", "continue_")
    assert server.chat(**dict.fromkeys(names, "")).status_code == 200


@pytest.mark.parametrize("text", ["0", "00", "1", "-1", "false", "true", "left"])
def test_a_text_that_reads_as_a_number_or_flag_is_not_off(server, text):
    texts = ("stop_regex", "prompt", "system", "lora", "negative_prompt", "cached_content")
    for name in (*texts, "custom_token_bans", "template"):
        answer = server.chat(**{name: text})
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(("temperature", "status"), [(0, 200), (1, 200), (0.7, 400), (None, 400)])
def test_the_temperature_comes_last_only_where_its_place_does_not_show(server, temperature, status):
    response = server.chat(temperature_last=True, temperature=temperature)
    assert response.status_code == status, response.text
    if status == 400:
        assert "the temperature comes before" in response.json()["error"]["message"]


def test_members_of_a_thinking_config(server):
    config = {"thinkingLevel": "LOW", "thinkingBudget": "", "mood": 1}
    found = read("chat", {"thinking_config": config})
    assert (found.body, found.unknown) == ({"reasoning_effort": "low"}, ["thinking_config.mood"])
    error = server.chat(thinking_config={"thinkingLevel": 5}).json()["error"]
    assert error["param"] == "thinking_config"
    assert "thinkingLevel that is a text" in error["message"]


def test_what_the_llama_cpp_web_page_sends(server):
    """All its sampling fields, every one at its default."""
    page = {
        "samplers": ["top_k"], "dynatemp_range": 0, "dynatemp_exponent": 1, "typical_p": 1,
        "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1,
        "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1,
        "n_predict": -1, "timings_per_token": False, "cache_prompt": True, "mirostat": 0,
    }  # fmt: skip
    assert server.chat(**page).status_code == 200
    error = server.chat(**{**page, "repeat_penalty": 1.2}).json()["error"]
    assert error["param"] == "repeat_last_n"


def test_names_that_bind():
    binding = ("output_schema", "guided_x", "max_answer_tokens", "foo_penalty", "stopWords",
               "custom_regex", "min_words", "system_prompt", "lora_name")  # fmt: skip
    others = ("mood", "trace_id", "maximum", "x", "", "prompt_id", "tokens", "sessionId")
    assert all(map(looks_binding, binding))
    assert not any(map(looks_binding, others))


UNKNOWN_HERE = {
    "/v1/messages": (
        {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]},
        "",
        ("stop", "grammar", "response_format", "max_completion_tokens", "chat_template_kwargs"),
    ),
    "/api/chat": (
        {"messages": [{"role": "user", "content": "x"}]},
        "",
        ("stop", "grammar", "response_format", "max_tokens", "num_predict", "tool_choice"),
    ),
    "/api/generate": ({"prompt": "x"}, "options", ("grammar", "max_tokens", "stop_token_ids")),
    "/generate": ({"inputs": "x"}, "parameters", ("response_format", "guided_regex")),
}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, row in UNKNOWN_HERE.items() for name in row[2]]
)
def test_other_protocols_refuse_what_would_bind(server, path, name):
    """A field of another endpoint that constrains the answer is not dropped."""
    body, holder, _ = UNKNOWN_HERE[path]

    def post(value):
        fields = {holder: {name: value}} if holder else {name: value}
        return server.post(path, {"model": MODEL, "stream": False, **body, **fields})

    answer = post({"x": 1})
    assert answer.status_code in (400, 422), answer.text
    assert name in answer.text
    for harmless in (None, [], {}, False):
        assert post(harmless).status_code == 200


def test_members_of_every_model_are_own_names():
    """A row whose name every endpoint has itself would never be looked up."""
    for row in TABLE:
        for name in row.names:
            ends = [one for one in row.endpoints if name not in MODELS[one].wire_names()]
            assert ends, f"{name} is a field of each of its endpoints: remove the row"
