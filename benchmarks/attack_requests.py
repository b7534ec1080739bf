"""Build 200 requests that try to cost a server much more than they cost the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ANSWER = {"max_tokens": 2000, "ignore_eos": True, "temperature": 1.0, "stream": True}
CHARS = 8000  # of a text in requests whose number of characters is not the point


@dataclass(frozen=True, slots=True)
class Attack:
    """One request.

    Attributes:
        kind: what it tries to make slow.
        name: of the request, unique within its kind.
        path: of the endpoint.
        body: JSON, or what is sent in its place.
    """

    kind: str
    name: str
    path: str
    body: bytes


Made = Iterator[tuple[str, str, Any]]


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "The weather", **ANSWER, **fields}


def _chat(content: Any = "List some pets.", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **ANSWER, **fields}


def bodies() -> Made:
    """Bodies that are work to parse or to refuse."""
    for item, count in ((b"[1]", 400_000), (b"{}", 500_000), (b"1", 900_000), (b'""', 600_000)):
        raw = b'{"model":"m","prompt":[' + b",".join([item] * count) + b"]}"
        yield f"{count} x {item.decode()}", COMPLETIONS, raw
    for depth in (90, 5_000, 400_000):
        yield f"{depth} levels of lists", COMPLETIONS, b"[" * depth + b"1" + b"]" * depth
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        yield f"{depth} levels of objects", CHAT, deep[: 2 << 20]
    yield "one number of 1 MB", COMPLETIONS, b'{"prompt":' + b"9" * 1_000_000 + b"}"
    yield "one string of escapes", COMPLETIONS, b'{"prompt":"' + b"\\u0041" * 300_000 + b'"}'
    yield "2 MB of spaces", COMPLETIONS, b" " * ((2 << 20) - 2) + b"{}"
    yield "100,000 exact numbers", COMPLETIONS, b'{"prompt":[' + b"0.123456789e-300," * 100_000
    yield "a string without an end", COMPLETIONS, b"[" * 30_000 + b'"' + b'\\"' * 900_000
    members = b",".join(b'"k%d":1' % i for i in range(100_000))
    yield "100,000 members", COMPLETIONS, b"{" + members + b"}"
    parts = [{"type": "text", "text": "a"}] * 16_000
    yield "16,000 parts of a text", CHAT, _chat(parts)
    yield "4,000 messages", CHAT, _chat() | {"messages": [{"role": "user", "content": "a"}] * 4000}


def schemas() -> Made:
    """JSON schemas that are slow to compile or at each token."""
    text = {"type": "string"}
    chain: dict[str, Any] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(200)}
    nest: dict[str, Any] = text
    for _ in range(60):
        nest = {"properties": {"a": nest, "b": text}, "required": ["a"]}
    tree: dict[str, Any] = {"type": "null"}
    for _ in range(12):
        tree = {"anyOf": [tree, {"items": tree}]}
    wide = {f"property_{i}": {"type": ["string", "null"]} for i in range(1000)}
    found: dict[str, Any] = {
        "a reference to itself": {"$ref": "#"},
        "a chain of references": {"$defs": chain | {"d200": text}, "$ref": "#/$defs/d0"},
        "60 levels": nest,
        "4,096 branches": tree,
        "1,000 optional members": {"properties": wide},
        "1,000 required members": {"properties": wide, "required": list(wide)},
        "2,000 texts": {"enum": [f"value {i:04}" for i in range(2000)]},
        "2,000 equal beginnings": {"enum": ["a" * i for i in range(1, 2000)]},
        "a pattern of 100,000": {"type": "string", "pattern": "^a{100000}$"},
        "a pattern of choices": {"type": "string", "pattern": "^(a|b|ab|ba){1,900}$"},
        "a text of 100,000": {"type": "string", "maxLength": 100_000},
        "a text of at least 5,000": {"type": "string", "minLength": 5000, "maxLength": 9000},
        "100,000 items": {"type": "array", "maxItems": 100_000, "items": {"type": "integer"}},
        "5,000 items at least": {"type": "array", "minItems": 5000, "items": {"type": "number"}},
        "lists of lists": {"minItems": 40, "items": {"minItems": 40, "items": {"const": 1}}},
        "50 alternatives of objects": {
            "anyOf": [{"properties": {f"k{i}": text, "z": {"const": i}}} for i in range(50)]
        },
        "all of 90": {"allOf": [{"properties": {f"k{i}": text}} for i in range(90)]},
        "one of 60": {"oneOf": [{"type": "string", "pattern": f"^x{i}.*"} for i in range(60)]},
        "any members": {"additionalProperties": {"additionalProperties": {"type": "number"}}},
        "patterns of members": {"patternProperties": {f"^{c}.*$": text for c in "abcdefghij"}},
        "an exact number": {"type": "number", "minimum": 1e-300, "maximum": 1e300},
        "names of members": {"propertyNames": {"pattern": "^(a|b){1,500}$"}},
        "conditions": {"if": {"const": 1}, "then": {"$ref": "#"}, "else": {"$ref": "#"}},
        "a multiple": {"type": "integer", "multipleOf": 9973},
        "formats": {
            "properties": {f: {"format": f} for f in ("date-time", "uuid", "email", "uri")}
        },
    }
    for name, schema in found.items():
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        yield name, CHAT, _chat(response_format=form)
    yield "the last one, 16 times", CHAT, _chat(response_format=form, n=16)


def patterns() -> Made:
    """Regular expressions, Lark grammars and lists of choices."""
    for pattern in (
        "a{100000}", "(a{100}){100}", "(.{1,9999}){9999}", "(a?){900}a{900}", "(a|aa)+$",
        ".{0,100000}", "[a-z]{1,5000}", r"\w{1,4000} \w{1,4000}", r"(\d{1,3}\.){300}", "(a*)*b",
        "[^a]{2000}", ".*.*.*.*.*.*x", "(ab|cd|ef|gh){1,2000}", "((((a{9}){9}){9}){9}){9}",
        r"[\u4e00-\u9fff]{1,3000}", r"(?i:[a-z]{500})", "|".join(f"word{i}" for i in range(900)),
        "x" * 8000, "(" * 4000 + ")" * 4000, "(a|b)*a(a|b){12}", r"\p{L}{1,2000}", "(.|\n){5000}",
    ):  # fmt: skip
        name = pattern if len(pattern) < 30 else f"{pattern[:20]}..."
        yield f"regex {name!r}", COMPLETIONS, _completion(structured_outputs={"regex": pattern})
    yield "regex x 16", COMPLETIONS, _completion(structured_outputs={"regex": ".{9000}"}, n=16)
    for name, grammar in {
        "a long literal": 'start: "' + "a" * 5000 + '"',
        "repeats": 'start: ("a" | "b")~5000..100000',
        "left recursion": 'start: start "a" | start start | "b"',
        "2,000 rules": "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(2000)),
        "ambiguous": "start: a a a a a a\na: /x*/ a | /x*/",
        "nullable": 'start: (a*)~500\na: b?\nb: "x"?',
    }.items():
        yield f"grammar {name}", COMPLETIONS, _completion(structured_outputs={"grammar": grammar})
    for name, choice in {
        "2,000 words": [f"choice {i}" for i in range(2000)],
        "one of 4,000 letters": ["x", "y" * 4000],
        "equal beginnings": ["ab" * i for i in range(1, 240)],
    }.items():
        yield f"choice of {name}", COMPLETIONS, _completion(structured_outputs={"choice": choice})


def choices() -> Made:
    """Many sequences for one request."""
    for n in (16, 63, 64, 128):
        yield f"n={n}", COMPLETIONS, _completion(n=n)
        yield f"n={n}, top_k and top_p", COMPLETIONS, _completion(n=n, top_k=900, top_p=0.99)
    yield "n=128 of 4,000 tokens", COMPLETIONS, _completion(n=128, prompt=ids(4000))
    yield "n=128 without an end", COMPLETIONS, _completion(n=128, min_tokens=2000)
    yield "best_of 128", COMPLETIONS, _completion(best_of=128, stream=False, n=1)
    yield "8 prompts of n=128", COMPLETIONS, _completion(n=128, prompt=["a"] * 8)
    yield "1,024 prompts", COMPLETIONS, _completion(prompt=[f"p{i}" for i in range(1024)])
    for width in (8, 32):
        beam = {"use_beam_search": True, "n": width, "temperature": 0.0, "stream": False}
        yield f"{width} beams", COMPLETIONS, _completion(**beam)
    for name, fields in {
        "repetition": {"repetition_penalty": 1.5},
        "frequency and presence": {"frequency_penalty": 1.0, "presence_penalty": 1.0},
        "all, long prompt": {
            "repetition_penalty": 1.2, "frequency_penalty": 0.5, "prompt": ids(4000)
        },
        "min_p": {"min_p": 0.01, "top_k": 40_000},
    }.items():  # fmt: skip
        yield f"n=48, {name}", COMPLETIONS, _completion(n=48, **fields)


def tokens() -> Made:
    """Log-probabilities, biases and lists of tokens or stops."""
    for n in (1, 32, 64):
        yield f"20 log-probabilities x {n}", COMPLETIONS, _completion(logprobs=20, n=n)
        fields = {"logprobs": True, "top_logprobs": 20, "n": n}
        yield f"20 log-probabilities x {n}, chat", CHAT, _chat(**fields)
    for length in (500, 4000, 7900):
        fields = {"prompt": ids(length), "prompt_logprobs": 20, "max_tokens": 1}
        yield f"log-probabilities of {length} tokens", COMPLETIONS, _completion(**fields)
    fields = {"echo": True, "logprobs": 20, "prompt": "word " * 3000, "max_tokens": 1}
    yield "log-probabilities of an echo", COMPLETIONS, _completion(**fields)
    for count, n in ((300, 1), (1024, 1), (1024, 64), (40_000, 1)):
        bias = {str(i): (-1) ** i * 5 for i in range(count)}
        yield f"{count} biases x {n}", COMPLETIONS, _completion(logit_bias=bias, n=n)
    for count, n in ((40_000, 1), (40_000, 64), (200_000, 1)):
        allowed = [i % 49_000 for i in range(count)]
        yield f"{count} allowed x {n}", COMPLETIONS, _completion(allowed_token_ids=allowed, n=n)
    words = [f"word number {i} " * 9 for i in range(64)]
    yield "64 bad words", COMPLETIONS, _completion(bad_words=words)
    yield "64 bad words x 64", COMPLETIONS, _completion(bad_words=words, n=64)
    yield "9,000 bad words", COMPLETIONS, _completion(bad_words=["a"] * 9000)
    for name, stop in {
        "4 long": [c * 256 for c in "abcd"],
        "of its beginnings": ["e" * 250 + c for c in "abcd"],
        "50,000": ["a"] * 50_000,
        "1 MB": "x" * 1_000_000,
        "one letter": ["~", "^", "`", "|"],
    }.items():
        yield f"stop strings {name}", COMPLETIONS, _completion(stop=stop, n=16)
    yield "256 stop tokens", COMPLETIONS, _completion(stop_token_ids=list(range(1000, 1256)), n=64)


def ids(count: int) -> list[int]:
    """Return token ids without a pattern."""
    return [(count * 31 + i * 7919) % 40_000 + 100 for i in range(count)]


def prompts() -> Made:
    """Long texts and token lists; each text is one that tokenizers find hard."""
    for name, text in {
        "spaces": " " * 500_000,
        "one letter": "a" * 500_000,
        "letters and digits": "a1" * 250_000,
        "words": "word " * 7000,
        "words of another length": "understanding " * 7000,
        "emoji": "\U0001f469\u200d\U0001f680" * 3000,
        "joined letters": "e\u0301\u0302\u0303" * 30_000,
        "Chinese": "\u7684\u662f\u4e0d" * 9000,
        "line ends": "\r\n" * 200_000,
        "one long word": "abcdefghijklmnopqrstuvwxyz" * 20_000,
        "control tokens": "<|im_start|>" * 20_000,
        "nearly control tokens": "<|im_" * 60_000,
        "quotes": "\"'" * 200_000,
        "2 MB": "the " * 500_000,
    }.items():
        yield f"text: {name}", COMPLETIONS, _completion(prompt=text)
    yield "chat of spaces", CHAT, _chat(" " * 400_000)
    yield "chat of control tokens", CHAT, _chat("<|im_end|>" * 20_000)
    for length in (2000, 4000, 7900, 8191, 60_000):
        yield f"{length} token ids", COMPLETIONS, _completion(prompt=ids(length), max_tokens=1)
    yield "7,900 equal ids", COMPLETIONS, _completion(prompt=[500] * 7900, max_tokens=1)
    yield "ids of no token", COMPLETIONS, _completion(prompt=[10**9] * 100_000)
    yield "500 lists of ids", COMPLETIONS, _completion(prompt=[[5, 6, i] for i in range(500)])
    cut = {"prompt": "word " * 60_000, "truncate_prompt_tokens": 4000}
    yield "cut to 4,000 tokens", COMPLETIONS, _completion(**cut)


def templates() -> Made:
    """Chat templates in requests, where the server trusts them."""
    loop = "{% for i in range(99999) %}"
    for name, source in {
        "two loops": loop * 2 + "{% endfor %}" * 2,
        "four loops": "{% for a in range(999) %}" * 4 + "x" + "{% endfor %}" * 4,
        "a long text": "{{ 'a' * 10**9 }}",
        "a text doubled": "{% set ns = namespace(t='ab') %}" + loop
        + "{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "a power": "{{ 9**9**9 }}",
        "a list": "{{ (messages, ) * 99999999 }}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "a sort": "{{ range(90000) | sort(reverse=true) | join }}",
        "replacement": "{{ ('a' * 99999) | replace('a', 'b' * 999) }}",
        "JSON": "{% for i in range(9999) %}{{ messages | tojson }}{% endfor %}",
        "a join": "{{ (['abc'] * 90000) | join('x' * 900) }}",
        "60 KB of ifs": "{% if messages %}" * 1500 + "{% endif %}" * 1500,
        "60 KB of text": "x" * 60_000 + "{{ messages[0].content }}",
        "a format": "{{ '%99999999d' % 1 }}",
        "an indent": "{{ ('a\\n' * 30000) | indent(99999) }}",
        "word wrap": "{{ ('a ' * 30000) | wordwrap(1) }}",
    }.items():  # fmt: skip
        yield name, CHAT, _chat(chat_template=source)


def tools() -> Made:
    """Tools, forced calls and the schemas of their arguments."""
    fields = {f"field_{i}": {"type": "string", "description": "d" * 50} for i in range(40)}

    def tool(index: int, parameters: Any, **more: Any) -> dict[str, Any]:
        function = {"name": f"tool_{index}", "parameters": parameters, **more}
        return {"type": "function", "function": function}

    plain = {"type": "object", "properties": fields}
    for count in (16, 128, 1000):
        many = [tool(i, plain) for i in range(count)]
        yield f"{count} tools", CHAT, _chat(tools=many)
        yield f"{count} tools, one required", CHAT, _chat(tools=many, tool_choice="required")
    strict = [tool(i, plain | {"required": [*fields]}, strict=True) for i in range(16)]
    yield "16 strict tools", CHAT, _chat(tools=strict, tool_choice="required")
    yield "a strict tool x 32", CHAT, _chat(tools=strict[:1], tool_choice="required", n=32)
    yield "16 strict tools, not forced", CHAT, _chat(tools=strict)
    yield "400 KB of a schema", CHAT, _chat(tools=[tool(0, {"enum": ["x" * 400_000]}, strict=True)])
    loop = [tool(0, {"$ref": "#"}, strict=True)]
    yield "arguments without end", CHAT, _chat(tools=loop, tool_choice="required")
    long = [tool(0, plain, description="d" * 100_000)]
    yield "a long description", CHAT, _chat(tools=long)
    call = {"id": "c", "type": "function", "function": {"name": "t", "arguments": "{" * 100_000}}
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call] * 8}]
    results = [{"role": "tool", "tool_call_id": "c", "content": "x" * 100}] * 2000
    yield "2,000 results", CHAT, _chat() | {"messages": [*history, *results]}
    yield "arguments that are no JSON", CHAT, _chat() | {"messages": history}


def other_endpoints() -> Made:
    """Responses, embeddings, tokenization and what else takes a body."""

    def response(**fields: Any) -> dict[str, Any]:
        return {"model": "m", "input": "hi", "max_output_tokens": 2000, "stream": True, **fields}

    item = {"role": "user", "content": "a"}
    yield "1,200 items", RESPONSES, response(input=[item] * 1200)
    yield "8,000 items", RESPONSES, response(input=[item] * 8000)
    parts = [{"type": "input_text", "text": "a"}] * 8000
    yield "8,000 parts", RESPONSES, response(input=[{"role": "user", "content": parts}])
    output = {"type": "function_call_output", "call_id": "c", "output": "x" * 200_000}
    yield "a long output of a call", RESPONSES, response(input=[item, output])
    calls = [{"type": "function_call", "call_id": f"c{i}", "name": "t", "arguments": "{}"}
             for i in range(3000)]  # fmt: skip
    yield "3,000 calls", RESPONSES, response(input=[item, *calls])
    references = [{"type": "item_reference", "id": f"msg_{i}"} for i in range(9000)]
    yield "9,000 references", RESPONSES, response(input=references)
    yield "no such response", RESPONSES, response(previous_response_id="resp_" + "a" * 60)
    yield "stored", RESPONSES, response(input=[item] * 600, store=True)
    yield "in the background", RESPONSES, response(background=True, stream=False)
    yield "long instructions", RESPONSES, response(instructions="word " * 40_000)
    yield "metadata", RESPONSES, response(metadata={f"k{i}": "v" * 500 for i in range(16)})
    for name, given in {
        "2,048 texts": [f"text {i}" for i in range(2048)],
        "300 texts of 200 words": ["word " * 200] * 300,
        "7,900 ids": ids(7900),
        "64 lists of 1,000 ids": [ids(1000 + i) for i in range(64)],
        "2 MB": "word " * 400_000,
    }.items():
        yield f"embeddings: {name}", "/v1/embeddings", {"model": "m", "input": given}
    for name, text in {
        "spaces": " " * 900_000,
        "words": "word " * 300_000,
        "a": "a" * 1_500_000,
    }.items():
        yield f"tokenize: {name}", "/tokenize", {"model": "m", "prompt": text}
    for name, given in {"200,000 ids": [5] * 200_000, "ids of no token": [2**31] * 90_000}.items():
        yield f"detokenize: {name}", "/detokenize", {"model": "m", "tokens": given}
    batch = {"prompt": ["a"] * 1024, "n": 1, "logprobs": 20, "model": "m", "max_tokens": 1}
    yield "1,024 short prompts", COMPLETIONS, batch
    yield "render", "/v1/chat/completions/render", _chat("word " * 30_000)
    yield "explain", "/v1/cache/explain", {"model": "m", "prompt": "word " * 30_000}


def _varied(body: dict[str, Any], number: int) -> dict[str, Any]:
    """A body whose grammar has not been compiled for an earlier one of the same attack."""
    outputs = dict(body.get("structured_outputs", {}))
    if "regex" in outputs:
        outputs["regex"] += f"|{number}"
    if "grammar" in outputs:
        outputs["grammar"] += f"\n// {number}\n"
    if "choice" in outputs:
        outputs["choice"] = [*outputs["choice"], f"{number}"]
    varied = body | ({"structured_outputs": outputs} if outputs else {})
    if "response_format" in body:
        form = body["response_format"]
        schema = form["json_schema"]["schema"] | {"title": f"{number}"}
        varied["response_format"] = form | {"json_schema": {"name": "s", "schema": schema}}
    if "tools" in body:
        first, *others = body["tools"]
        schema = first["function"]["parameters"] | {"title": f"{number}"}
        function = first["function"] | {"parameters": schema}
        varied["tools"] = [first | {"function": function}, *others]
    return varied


def attacks(number: int = 0) -> list[Attack]:
    """Return the corpus, in an order that mixes the kinds; it is the same in every run.

    A salt for each keeps one from finding another's prompt in the cache.

    Args:
        number: corpora of other numbers share no prompt, and no grammar of a request's own, with
            this one.
    """
    kinds = (
        bodies, schemas, patterns, choices, tokens, prompts, templates, tools, other_endpoints,
    )  # fmt: skip
    found = []
    for kind in kinds:
        for index, (name, path, body) in enumerate(kind()):
            if path in (COMPLETIONS, CHAT) and isinstance(body, dict):
                body = _varied(body, number) if number else body
                body = {**body, "cache_salt": f"{kind.__name__} {index} {number}"}
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            found.append((index, Attack(kind.__name__.replace("_", " "), name, path, raw)))
    return [attack for _, attack in sorted(found, key=lambda entry: entry[0])]
