"""Make malformed HTTP requests, of which no two runs with one seed differ."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize",
    "/detokenize", "/v1/chat/completions/render", "/v1/models", "/nowhere", "/v1/../metrics",
    "/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate", "/api/embed",
    "/api/show", "/generate", "/generate_stream", "/", "/v1/files", "/v1/files/file-x/content",
    "/v1/batches", "/v1/batches/batch_x/cancel", "/v1/cache/explain", "/v1/responses/compact",
    "/v1/responses/input_tokens", "/v1/responses/resp_x", "/v1/responses/resp_x/cancel",
    "/v1/rerank", "/v1/usage", "/dashboard/requests", "/dashboard/requests/x",
)  # fmt: skip
BODIES: tuple[dict[str, Any], ...] = (
    {"model": "alias", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    {"model": "alias", "prompt": "hi", "max_tokens": 2},
    {"model": "alias", "input": "hi", "max_output_tokens": 16},
    {"model": "alias", "input": ["a", "b"]},
    {"tokens": [1, 2, 3]},
    {"inputs": "hi", "parameters": {"max_new_tokens": 2, "stop": ["a"]}},
    {"model": "alias", "prompt": "hi", "stream": False, "options": {"num_predict": 2}},
    {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"},
    {"model": "alias", "max_tokens": 2, "system": [{"type": "text", "text": "a"}],
     "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
     "tools": [{"name": "a", "input_schema": {"type": "object"}}]},
)  # fmt: skip
FIELDS = (
    "n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs",
    "logit_bias",
    "top_logprobs", "max_tokens", "tools", "tool_choice", "response_format", "structured_outputs",
    "stream", "stream_options", "messages", "prompt", "input", "tokens", "model", "user",
    "metadata",
    "allowed_token_ids", "bad_words", "priority", "cache_salt", "prompt_cache_options", "echo",
    "truncate_prompt_tokens", "dimensions", "encoding_format", "previous_response_id", "functions",
    "function_call", "chat_template", "chat_template_kwargs", "length_penalty", "use_beam_search",
    "prompt_logprobs", "repetition_penalty", "unknown", "", "\u0000", "__class__", "x" * 300,
    "system", "thinking", "stop_sequences", "cache_control", "modalities", "instructions",
    "include", "reasoning", "background", "text", "options", "format", "keep_alive", "think",
    "template", "inputs", "parameters", "endpoint", "completion_window", "input_file_id",
    "output_expires_after",
)  # fmt: skip
SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"anyOf": []}, {"enum": []}, {"type": "nope"}, {"pattern": "("}, {"pattern": "(a+)+$"},
    {"minItems": 10**18}, {"minItems": -1}, {"properties": []}, {"items": [[]]}, {"const": {}},
    {"$ref": "file:///etc/passwd"}, {"$ref": 5}, {"allOf": [{"allOf": [{}]}] * 99},
)  # fmt: skip
GRAMMARS = ("(", "a{99999}", "[", "\\", "(?<", "a" * 9000, "(.{1,9999}){9999}", "", "\\x{ffffff}")


def _value(rnd: random.Random, depth: int = 0) -> Any:
    """A JSON value that no field expects, or one at the edge of what it takes."""
    kind = rnd.randrange(14 if depth < 3 else 9)
    if kind < 9:
        return rnd.choice(
            [
                None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "",
                "a", "\u0000", "\ud7ff", "12", "null", "<|im_end|>", "x" * 5000, "\r\n\x1b[31m",
                "../../etc/passwd", "{{ 7*7 }}", "http://127.0.0.1:1/x",
            ]
        )  # fmt: skip
    if kind == 9:
        return [_value(rnd, depth + 1)] * rnd.choice([0, 1, 5, 300])
    if kind == 10:
        return {rnd.choice(FIELDS): _value(rnd, depth + 1) for _ in range(rnd.randrange(4))}
    if kind == 11:
        return rnd.choice(SCHEMAS)
    if kind == 12:
        name = rnd.choice(["json", "regex", "choice", "grammar", "json_object", "nope"])
        return {name: rnd.choice([rnd.choice(SCHEMAS), rnd.choice(GRAMMARS), [], ["a"] * 2000])}
    schema = {"name": "s", "schema": rnd.choice(SCHEMAS), "strict": rnd.random() < 0.5}
    return {"type": rnd.choice(["json_schema", "json_object", "x"]), "json_schema": schema}


def _raw_body(rnd: random.Random) -> bytes:
    """Bytes that are no request: cut, broken, deep, wide, or not UTF-8."""
    whole = json.dumps(rnd.choice(BODIES)).encode()
    return rnd.choice(
        [
            b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"a":NaN}', b'{"a":1e999}',
            b'{"n":-Infinity}',
            b'"\\ud800"', b'{"prompt":"\\ud800"}', b"[" * 5000, b'{"a":' * 3000,
            b'{"prompt":[' + b"[1]," * 40_000 + b"[1]]}",
            b'{"prompt":[' + b"1," * 300_000 + b"1]}",
            b"[" * 33_000 + b'"' + b'\\"' * 40_000,
            whole[: rnd.randrange(len(whole))],
            whole.replace(b'"', b"'"),
            bytes(rnd.randrange(256) for _ in range(rnd.randrange(1, 300))),
        ]
    )  # fmt: skip


def _mutated(rnd: random.Random) -> bytes:
    body = dict(rnd.choice(BODIES))
    for _ in range(rnd.randrange(1, 4)):
        body[rnd.choice(FIELDS)] = _value(rnd)
    body.pop("max_tokens") if rnd.random() < 0.1 and "max_tokens" in body else None
    return json.dumps(body).encode()


def _headers(rnd: random.Random, length: int) -> list[str]:
    lines = [f"Content-Length: {length}", "Connection: close"]
    lines.append(rnd.choice(["Host: 127.0.0.1", "Host: 127.0.0.1", "Host: 127.0.0.1", "Host: a.b"]))
    lines.append(rnd.choice(["Content-Type: application/json"] * 4 + ["Content-Type: x", "X: y"]))
    odd = (
        "Transfer-Encoding: chunked", "Content-Encoding: gzip", "X-Request-Id: a\x7fb",
        "X-Request-Id: " + "a" * 500, "Authorization: Bearer \xff", "Content-Length: 7",
        "Content-Length: -1", "Bad Header: x", ": x", "X-Long: " + "a" * 40_000,
        "Expect: 100-continue", "Upgrade: websocket", "Range: bytes=0-",
    )  # fmt: skip
    if rnd.random() < 0.25:
        lines.append(rnd.choice(odd))
    return lines


def malformed_requests(seed: int, count: int) -> Iterator[bytes]:
    """Whole requests as bytes; equal seeds give equal requests."""
    rnd = random.Random(seed)
    for _ in range(count):
        body = _raw_body(rnd) if rnd.random() < 0.3 else _mutated(rnd)
        method = rnd.choice(["POST"] * 9 + ["GET", "PUT", "DELETE", "OPTIONS", "P\x00ST"])
        path = rnd.choice(PATHS)
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *_headers(rnd, len(body)), "", ""])
        yield head.encode("latin-1") + body
