"""What a user tries in the first hour: paths, methods, encodings and values of common clients."""

from __future__ import annotations

import json

import pytest
from fake_engine import MODEL

from chunkllama_server.transport.paths import canonical_path

PATH = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "say(é)yas"}]}
SPELLINGS = [
    ("/v1/models/", "/v1/models"),
    ("/models", "/v1/models"),
    ("/v1/v1/models", "/v1/models"),
    ("//v1//models", "/v1/models"),
    ("/models/org/tiny", "/v1/models/org/tiny"),
    ("/chat/completions", PATH),
    ("/v1/chat/completions/", PATH),
    ("/chat/completions/render/", f"{PATH}/render"),
    ("/completions", "/v1/completions"),
    ("/responses/input_tokens", "/v1/responses/input_tokens"),
    ("/embeddings/", "/v1/embeddings"),
    ("/v1/tokenize", "/tokenize"),
    ("/v1/health", "/health"),
    ("/health/ready/", "/health/ready"),
    ("/v1/metrics", "/metrics"),
    ("/ping", "/health"),
    ("/v1/ping/", "/health"),
    ("/", "/"),
    ("/v1", "/v1"),
    ("/v1/models", "/v1/models"),
    ("/v2/x", "/v2/x"),
    ("/modelsx", "/modelsx"),
    ("/dashboard", "/dashboard"),
    ("/v1" * 9000 + "/models", "/v1/models"),
    ("/v1" * 9000, "/v1/v1"),
    ("/" * 30_000 + "health" + "/" * 30_000, "/health"),
]


@pytest.mark.parametrize(("given", "canonical"), SPELLINGS)
@pytest.mark.parametrize("root", ["", "/llm"])
def test_canonical_paths(given, canonical, root):
    assert canonical_path(root + given, root) == root + canonical
    assert canonical_path(given, root) == canonical
    assert canonical_path(canonical, root) == canonical


WORDS = ("seed", "temperature", "max_tokens", "n", "stream", "reasoning_effort", "service_tier")
EMPTY = [
    *((name, "") for name in (*WORDS, "tool_choice", "response_format", "stop", "user")),
    *((name, {}) for name in ("tools", "functions", "response_format")),
]


@pytest.mark.parametrize(("name", "value"), EMPTY, ids=str)
def test_what_a_form_leaves_empty_is_absent(server, name, value):
    server.chat("hi")
    assert server.chat("hi", **{name: value}).status_code == 200
    plain, asked = server.engine.requests[-2:]
    assert asked.prompt_token_ids == plain.prompt_token_ids
    assert asked.sampling == plain.sampling


def test_stop_strings_of_null_are_absent(server):
    assert server.chat("hi", stop=["x", None, ""]).status_code == 200
    assert server.engine.requests[-1].sampling.stop == ("x",)


@pytest.mark.parametrize("path", ["/chat/completions", f"{PATH}/", "/v1/v1/chat/completions"])
def test_paths_reach_their_endpoint(server, path):
    assert server.post(path, BODY).status_code == 200


def test_no_spelling_of_a_path_goes_past_the_key_check(start_server):
    server = start_server(api_keys={"a": "k"})
    closed = ("/models", "//v1/models", "/v1/models/", "/health/../v1/models", "/v1/version")
    with server.http() as http:
        for path in closed:
            assert http.get(f"{server.url}{path}").status_code == 401, path
        assert http.get("/v1/health/", headers={"x-api-key": "k"}).status_code == 200
        assert http.get("/models/", headers={"x-api-key": "k"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/metrics"])
def test_head_is_get_without_a_body(server, path):
    with server.http() as http:
        head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert "x-request-id" in head.headers
    with server.http() as http:
        assert http.head(PATH).status_code == 405
        assert http.head("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (PATH, "POST, OPTIONS"),
        ("/v1/models/", "GET, HEAD, OPTIONS"),
        ("/v1/responses/resp_1", "GET, HEAD, DELETE, OPTIONS"),
    ],
)
def test_options_lists_the_methods(server, path, methods):
    with server.http() as http:
        response = http.options(path)
        assert (response.status_code, response.headers["allow"]) == (204, methods)
        assert http.options("/nothing").status_code == 404
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        refused = http.options(path, headers=preflight)
    assert not [name for name in refused.headers if name.startswith("access-control")]


def test_a_preflight_is_answered_as_configured(start_server):
    server = start_server(cors_origins=("https://a.example",), api_keys={"a": "k"})
    preflight = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with server.http() as http:
        response = http.options("/chat/completions/", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = http.options(PATH, headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def send(server, raw: bytes, kind: str | None):
    with server.http() as http:
        headers = {} if kind is None else {"content-type": kind}
        return http.post(PATH, content=raw, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        ("utf-8-sig", "application/json"),
        ("utf-8", "application/json; charset=UTF-8"),
        ("utf-8", "application/vnd.api+json"),
        ("utf-16", "application/json"),
        ("utf-32", "application/json"),
        ("utf-16", "application/json; charset=utf-16"),
        ("utf-16-be", "application/json; charset=utf-16be"),
        ("iso-8859-1", "application/json; charset=ISO-8859-1"),
        ("cp1252", 'application/json; charset="windows-1252"'),
        ("utf-8", None),
        ("utf-8", "application/x-www-form-urlencoded"),
        ("utf-8", "text/plain"),
        ("iso-8859-1", "text/plain; charset=iso-8859-1"),
    ],
)
def test_bodies_are_read_in_their_encoding(server, encoding, kind):
    raw = json.dumps(BODY, ensure_ascii=False).encode(encoding)
    response = send(server, raw, kind)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "é"


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("application/json; charset=utf-7", 415, "unsupported_charset"),
        ("application/json; charset=base64", 415, "unsupported_charset"),
        ("application/json; charset=nonsense", 415, "unsupported_charset"),
        ("application/json; charset=utf-16", 400, "invalid_json"),
        ("multipart/form-data; boundary=x", 400, None),
        ("image/png", 400, None),
    ],
)
def test_other_encodings_are_refused(server, kind, status, code):
    raw = json.dumps(BODY).encode() + b" "
    raw += b" " * (len(raw) % 2 == 0)
    response = send(server, raw, kind)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, None),
        ({"model": None}, None),
        ({"tools": []}, None),
        ({"tools": [], "tool_choice": "auto"}, None),
        ({"tools": None, "functions": []}, None),
        ({"max_tokens": 5.0, "top_k": 7.0, "n": 1.0, "seed": 3.0}, None),
        ({"stop": ""}, None),
        ({"stop": [""]}, None),
        ({"stop": []}, None),
        ({"stream_options": None}, None),
        ({"store": True}, "store"),
        ({"store": False}, None),
        ({"tools": [{"type": "namespace", "name": "m", "tools": []}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "auto"}, "tools[0]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, None),
    ],
    ids=str,
)
def test_values_that_clients_send(server, fields, named):
    response = server.post(PATH, {**BODY, **fields})
    assert response.status_code == 200, response.text
    assert response.headers.get("x-chunkllama-ignored-fields") == named


def test_template_variables(start_server):
    """Variables that the template reads are handed to it; others are named."""
    source = "{{ messages[0].content }} say({{ preserve_thinking }}{{ loop_count }})yas"
    server = start_server(template_source=source)
    kwargs = {"preserve_thinking": True, "loop_count": 2, "mood": "x", "nothing": None}
    response = server.chat("x", chat_template_kwargs=kwargs)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "True2"
    named = response.headers["x-chunkllama-ignored-fields"]
    assert named == "chat_template_kwargs.mood"
    body = {"input": "x", "chat_template_kwargs": kwargs}
    assert server.post("/v1/responses", body).json()["output"][0]["content"][0]["text"] == "True2"
    listed = start_server(template_source=source, chat_template_kwargs=("loop_count",))
    assert listed.chat("x", chat_template_kwargs={"loop_count": 2}).status_code == 200
    assert listed.chat("x", chat_template_kwargs={"mood": 1}).status_code == 200
    refused = listed.chat("x", chat_template_kwargs={"preserve_thinking": True})
    assert refused.json()["error"]["param"] == "chat_template_kwargs"
    strict = start_server(template_source=source, strict=True)
    refused = strict.chat("x", chat_template_kwargs={"mood": 1})
    assert refused.json()["error"]["code"] == "unknown_field"


def test_one_number_says_what_fits(start_server):
    """A pool of 500 tokens beside a context of 2,048: each place says 501."""
    server = start_server()
    server.engine.info.num_chunks, server.engine.info.chunk_size = 5, 100
    server.engine.info.max_request_tokens = 501
    with server.http() as http:
        model = http.get(f"/v1/models/{MODEL}").json()
    assert (model["max_request_tokens"], model["max_model_len"]) == (501, 501)
    assert server.post("/tokenize", {"prompt": "x"}).json()["max_model_len"] == 501
    rendered = server.post(f"{PATH}/render", BODY).json()
    assert rendered["max_model_len"] == 501
    for fields in ({"max_tokens": 490}, {"max_completion_tokens": 490}):
        error = server.chat("hi" * 20, **fields).json()["error"]
        assert error["code"] == "context_length_exceeded"
        for number in ("501", "2048", "500"):
            assert number in error["message"]
    body = {"prompt": "a" * 495}
    assert server.post("/v1/completions", body).status_code == 200
    assert server.engine.requests[-1].sampling.max_tokens == 6
    assert server.post("/v1/completions", {"prompt": "a" * 501}).status_code == 400


@pytest.mark.parametrize("raw", ["", "null", "[]", '"x"'])
def test_a_body_that_is_no_object_is_said_to_be_none(server, raw):
    with server.http() as http:
        answer = http.post(PATH, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The request body must be a JSON object"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "hi", "context_management": [], "conversation": ""}),
        ("/v1/responses", {"input": "hi", "n": 1, "logprobs": False}),
        ("/v1/responses", {"input": [None, "hi"]}),
        ("/api/generate", {"model": MODEL, "stream": False, "prompt": "hi", "suffix": "",
                           "template": "", "images": [], "context": []}),
        ("/api/show", {"name": MODEL}),
        ("/v1/messages", {"messages": BODY["messages"], "max_tokens": 4, "mcp_servers": []}),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted(server, path, fields):
    assert server.post(path, fields).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "fix"),
    [
        ("/v1/responses", {"input": "hi", "n": 2}, "a response has one answer"),
        ("/v1/responses", {"input": "hi", "logprobs": True}, "send top_logprobs"),
        ("/v1/responses", {"input": "hi", "context_management": [{}]}, "not supported"),
        ("/v1/completions", {"messages": BODY["messages"]}, "send prompt, or use /v1/chat"),
        ("/v1/responses", {"messages": BODY["messages"]}, "send input, or use /v1/chat"),
    ],
)
def test_what_cannot_be_served_names_what_to_send(server, path, fields, fix):
    answer = server.post(path, fields)
    assert answer.status_code == 400 and fix in answer.json()["error"]["message"]


def test_a_top_p_of_one_samples_nothing(server):
    server.post("/generate", {"inputs": "hi", "parameters": {"top_p": 1.0, "max_new_tokens": 1}})
    assert server.engine.requests[-1].sampling.temperature == 0


def test_the_models_say_what_their_template_can(server):
    with server.http() as http:
        record = http.get(f"/v1/models/{MODEL}").json()["chat_template"]
    assert record == json.loads(
        json.dumps(server.app.state.context.text.template.capabilities.as_dict())
    )
    assert record["tools"] and record["call_markers"] == ["<tool_call>"]
