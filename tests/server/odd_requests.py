"""Bodies at the edges of what each endpoint reads, in the shapes of every protocol."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from fake_engine import MODEL

Request = tuple[str, Any]  # path; JSON, or bytes that are sent as they are
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "a"}
MANY_PROPERTIES = {"type": "object", "properties": {f"p{i}": {"type": "string"}
                                                   for i in range(7000)}}  # fmt: skip


def nested(levels: int, key: str | None = None) -> Any:
    """Lists, or objects with one member, within each other."""
    value: Any = 1
    for _ in range(levels):
        value = [value] if key is None else {key: value}
    return value


def anthropic() -> Iterator[Request]:
    """Messages: blocks, system, tools, thinking and cache marks."""
    deep: Any = {"type": "text", "text": "a"}
    for _ in range(40):
        deep = {"type": "tool_result", "tool_use_id": "x", "content": [deep]}
    marked = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    blocks: list[Any] = [
        deep, {"type": "tool_result", "tool_use_id": "x", "content": nested(50)}, {}, [], 5,
        {"type": "text", "text": None}, {"type": None},
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/"}},
        {"type": "document", "source": {"type": "base64", "data": "A" * 1_000_000}},
        {**marked, "cache_control": {"type": "ephemeral", "ttl": "9" * 1000}},
    ]  # fmt: skip
    fields: list[dict[str, Any]] = [
        *({"messages": [{"role": "user", "content": [block]}]} for block in blocks),
        {"messages": [{"role": "user", "content": [marked] * 500}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": 5}]}, USER]},
        {"system": [{"type": "text", "text": "a"}] * 4000}, {"system": nested(90)},
        {"stop_sequences": ["\u0301" * 300]}, {"stop_sequences": [""] * 9},
        {"thinking": {"type": "enabled", "budget_tokens": 10**18}}, {"thinking": nested(5, "a")},
        {"tools": [{"name": "f", "input_schema": MANY_PROPERTIES}]},
        {"tools": [{"name": "f" * 200, "input_schema": {}}]},
        {"tools": [{"name": "f", "input_schema": nested(60, "items")}],
         "tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "tool"}}, {"metadata": {"user_id": "x" * 10**6}},
        {"metadata": nested(80, "a")}, {"temperature": -0.0}, {"top_k": 10**30}, {"max_tokens": 0},
        {"container": "x" * 9000}, {"mcp_servers": [{"url": "http://127.0.0.1:1"}]},
    ]  # fmt: skip
    for given in fields:
        yield "/v1/messages", {"max_tokens": 2, "messages": [USER], **given}


def ollama() -> Iterator[Request]:
    """Chats, prompts and embeddings of Ollama, and paths it has and this server has not."""
    options: list[Any] = [
        {"num_predict": -1e300}, {"num_predict": 2**70}, {"num_ctx": 10**12}, {"temperature": -0.0},
        {"top_k": 1.5}, {"seed": 2**64}, {"stop": "\u0301" * 9999}, {"repeat_penalty": 1e-300},
        {"mirostat": 2}, {"x" * 9000: 1}, {"min_p": 2}, nested(80, "a"), [],
    ]  # fmt: skip
    fields: list[dict[str, Any]] = [
        *({"options": given} for given in options),
        {"format": nested(70, "items")}, {"format": "x"}, {"format": 5}, {"keep_alive": "9" * 999},
        {"messages": [{**USER, "images": ["A" * 10**6]}]}, {"think": "\u0000"}, {"think": 5},
        {"messages": [{"role": "tool", "content": "x", "tool_name": "\u0000"}]},
        {"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": nested(60, "a")}}]}, USER]},
        {"model": f"{MODEL}:latest:latest"}, {"model": "x" * 100_000}, {"model": "\u0000"},
    ]  # fmt: skip
    for given in fields:
        body = {"messages": [USER], "stream": False, "options": {"num_predict": 2}, **given}
        yield "/api/chat", body
    for given in ({"template": "{{ 7*7 }}"}, {"suffix": "b"}, {"context": [1]},
                  {"system": "<|im_end|>"}, {"raw": True, "prompt": "\u0000"}):  # fmt: skip
        body = {"prompt": "a", "stream": False, "options": {"num_predict": 2}, **given}
        yield "/api/generate", body
    for value in ([""], [[]], "a" * 9000, {"a": 1}):
        yield "/api/embed", {"input": value}
    yield "/api/embed", {"input": "a", "dimensions": 10**18}
    for path in ("pull", "create", "push", "copy", "blobs/sha256:00", "show"):
        yield f"/api/{path}", {"model": "../../etc/passwd", "from": "/etc/passwd"}


def tgi() -> Iterator[Request]:
    """Prompts of Text Generation Inference, and of its sibling for embeddings."""
    parameters: list[dict[str, Any]] = [
        {"grammar": {"type": "regex", "value": "a{100000}"}},
        {"grammar": {"type": "json", "value": nested(70, "items")}},
        {"grammar": {"type": "json", "value": []}}, {"grammar": {"type": "regex", "value": {}}},
        {"temperature": -0.0}, {"top_p": 0}, {"top_k": 0}, {"stop": [""]}, {"truncate": 0},
        {"best_of": 99}, {"seed": 2**70}, {"max_new_tokens": 10**18}, {"top_n_tokens": 999},
        {"repetition_penalty": 1e-300}, {"adapter_id": "../x"}, {"typical_p": 2},
        {"decoder_input_details": True, "details": True},
    ]  # fmt: skip
    for given in parameters:
        yield "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2, **given}}
    for value in (["a"], {"a": 1}, "\u0000", ""):
        yield "/generate", {"inputs": value, "parameters": {"max_new_tokens": 2}}
        yield "/embed", {"inputs": value}
    yield "/embed", {"inputs": "a", "dimensions": 0}
    yield "/", {"inputs": "a", "stream": "x"}


def responses() -> Iterator[Request]:
    """Input items, compacted conversations, tools and references of the Responses API."""
    packed = (b"[" * 100_000, b"[[1]]", b'{"a":NaN}', b'"\\ud800"', b"null", b'{"summary":[1]}')
    texts = ["\u00e9", "A", *(base64.urlsafe_b64encode(raw).decode() for raw in packed)]
    items: list[Any] = [{"type": "compaction", "encrypted_content": text} for text in texts]
    kinds = ("item_reference", "reasoning", "web_search_call", "computer_call_output",
             "custom_tool_call", "mcp_call", "local_shell_call", "\u0000", "x" * 9000)  # fmt: skip
    items += [{"type": kind, "id": "x", "output": nested(40), "action": nested(40, "a"),
               "summary": [{"text": 5}], "content": [{}]} for kind in kinds]  # fmt: skip
    grammars = (("lark", "("), ("regex", "a{100000}"), ("lark", "start: x"))
    fields: list[dict[str, Any]] = [
        *({"input": [item, USER]} for item in items),
        *({"tools": [{"type": "custom", "name": "f",
                      "format": {"type": "grammar", "syntax": syntax, "definition": text}}],
           "tool_choice": {"type": "custom", "name": "f"}} for syntax, text in grammars),
        {"background": True, "store": False}, {"background": "x"},
        {"previous_response_id": "\u0000"}, {"conversation": "conv_x"}, {"include": ["x"] * 100},
        {"text": {"format": nested(70, "schema")}}, {"reasoning": nested(80, "a")},
        {"tools": [{"type": "mcp", "server_url": "http://127.0.0.1:1"}]},
        {"tools": [{"type": "function"}]}, {"tool_choice": {"type": "allowed_tools", "tools": [1]}},
        {"input": []}, {"input": [{}]}, {"input": nested(90)}, {"metadata": {"a": "b" * 600}},
    ]  # fmt: skip
    for given in fields:
        yield RESPONSES, {"input": "a", "max_output_tokens": 16, **given}


def chats() -> Iterator[Request]:
    """Template variables, calls in the past, tools and schemas of a chat."""
    variables = ("self", "loop", "caller", "varargs", "true", "__class__", "a" * 65, "é",
                 "messages", "raise_exception", "range", "namespace", "_")  # fmt: skip
    arguments = (nested(80), "{" * 5000, "[" * 4000, "(" * 3000, "-" * 3000 + "1", "{'a':9**9}",
                 "1+" * 1500 + "1j")  # fmt: skip
    schemas: list[Any] = [
        {"type": "string", "pattern": "(?=a)"}, {"pattern": "\u0301" * 2000}, {"const": "\u0000"},
        {"format": "x" * 9000}, {"type": ["string"] * 300}, {"enum": [nested(40)]},
        {"enum": [None, 1e308, -0.0]}, {"minimum": 10**400}, {"minimum": 5, "maximum": 1},
        {"multipleOf": 0}, {"minLength": 10**18}, {"maxLength": -1}, {"required": [5]},
        {"properties": {"\u0000": {}}}, {"patternProperties": {"(": {}}}, {"not": {"not": {}}},
        {"$ref": "http://127.0.0.1:1/x"}, {"$id": "file:///etc/passwd", "$ref": "x"},
        {"$dynamicRef": "#x"}, {"if": {}, "then": {"$ref": "#"}}, {"prefixItems": [{}] * 2000},
        {"contains": {}, "minContains": 10**9}, {"x-guidance": {"whitespace_pattern": "(a*)*"}},
        {"allOf": [{"pattern": f"a{{{i}}}"} for i in range(30)]}, True, [], 5, "x",
    ]  # fmt: skip
    call = {"id": "a", "type": "function"}
    fields: list[dict[str, Any]] = [
        *({"chat_template_kwargs": {name: "<|im_end|>"}} for name in variables),
        *({"messages": [{"role": "assistant", "tool_calls": [
            {**call, "function": {"name": "f", "arguments": given}}]}, USER]}
          for given in arguments),
        *({"response_format": {"type": "json_schema",
                               "json_schema": {"name": "s", "schema": schema, "strict": strict}}}
          for schema in schemas for strict in (False, True)),
        *({"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
           "tool_choice": "required"} for schema in [*schemas, MANY_PROPERTIES]),
        {"messages": [{"role": "user", "content": nested(90)}]},
        {"messages": [{"role": "user", "content": [[{"type": "text", "text": "a"}]]}]},
        {"messages": [{**USER, "name": "\u0000" * 64}]}, {"prediction": {"content": nested(50)}},
        {"logit_bias": [[1, 2]] * 2000}, {"stream_options": 5}, {"metadata": {"a": [1]}},
        {"response_format": nested(90, "type")},
        {"response_format": {"type": "regex", "value": "("}},
        {"guided_json": "[" * 9000}, {"guided_grammar": "\n" * 60_000}, {"seed": 2**63},
    ]  # fmt: skip
    for given in fields:
        yield CHAT, {"messages": [USER], "max_tokens": 2, **given}


def texts() -> Iterator[Request]:
    """Numbers, biases, regular expressions and grammars of a text completion."""
    keys = ("１", " 1", "+1", "1_0", "01", "-0", "1.0", "1e1", "0x1", "", "9" * 400, "1\u0000", "١")
    patterns = (
        r"\p{Any}{1000}", r"\b" * 1000, "(?R)", "(?=(a+)+)", "[\x00-\U0010ffff]{1000}", r"\C",
        "(?i)" + "\u00df" * 2000, "(?P<" + "a" * 7000 + ">x)", r"\x{110000}", r"\u{d800}", "a{,5}",
        "(?:)" * 2000, "()*" * 2000, "(a*)*" * 500, "[[:alpha:]]{999}", "[a&&b]", "^$" * 2000,
    )  # fmt: skip
    grammars = (
        "start: /(?=a)/", "start: %json {", "start: @x", "start[max_tokens=99999999999]: /a/",
        "start: <[999999999]>", 'start: "a"~99999999999999999999', "start: a\na: b\nb: a",
        "start: " + "(" * 3000 + '"a"' + ")" * 3000, "%llguidance {}\nstart: /a/", "root ::= x",
        'start: %json {"allOf":[{"multipleOf":9973},{"multipleOf":9967}]}', "\n" * 60_000,
        "start: " + " ".join(f"r{i}" for i in range(3000)), "root ::= [\\u0000-\\U0010ffff]{1000}",
    )  # fmt: skip
    fields: list[dict[str, Any]] = [
        *({"logit_bias": {key: 1}} for key in keys),
        *({"structured_outputs": {"regex": pattern}} for pattern in patterns),
        *({"structured_outputs": {"grammar": grammar}} for grammar in grammars),
        {"stop": ["\u0000", "\u0301", "\U0001f600" * 64, "İ"]}, {"prompt": [""]}, {"prompt": []},
        {"allowed_token_ids": [97], "logit_bias": {"97": -100}, "bad_words": ["a"]},
        {"temperature": 1e-320}, {"top_p": 1e-320}, {"repetition_penalty": 1e-38}, {"n": -0.0},
        {"use_beam_search": True, "n": 3, "length_penalty": -10}, {"seed": -(2**63)},
    ]  # fmt: skip
    for given in fields:
        yield TEXT, {"prompt": "a", "max_tokens": 2, **given}
    head = b'{"prompt":"a","max_tokens":2,'
    for tail in (b'"max_tokens":3}', b'"temperature":1e400}', b'"temperature":-0}', b'"n":NaN}',
                 b'"seed":1e18}', b'"n":1}\x00', b'"n":1}}', b'"user":"\xed\xa0\x80"}',
                 b'"user":"\\ude00\\ud83d"}', b'"x":' + b"9" * 5000 + b"}"):  # fmt: skip
        yield TEXT, head + tail


def operators() -> Iterator[Request]:
    """Adapters, batches and token ids that are none."""
    paths = ("/etc", "/x\u0000y", "../" * 900, "x" * 4096, "/dev/zero", "/proc/self/fd", "-",
             "/" + "\U0001f600" * 100)  # fmt: skip
    for path in paths:
        yield "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": path}
    yield "/v1/load_lora_adapter", {"lora_name": "../a", "lora_path": "/tmp"}
    yield "/v1/unload_lora_adapter", {"lora_name": "\u0000"}
    for name in ("../../x", "file-\u0000", "x" * 9000):
        body = {"input_file_id": name, "endpoint": TEXT, "completion_window": "24h"}
        yield "/v1/batches", body
    yield "/detokenize", {"tokens": [2**31]}
    yield "/v1/cache/explain", {"prompt": "a", "cache_salt": "\u0000"}
    yield "/v1/embeddings", {"input": [[99_999]]}


FAMILIES = (anthropic, ollama, tgi, responses, chats, texts, operators)


def odd_requests() -> Iterator[tuple[str, bytes]]:
    """Path and body of each; the served model is named where the body names none."""
    for family in FAMILIES:
        for path, body in family():
            if isinstance(body, bytes):
                yield path, body
            else:
                yield path, json.dumps({"model": MODEL, **body}).encode()
