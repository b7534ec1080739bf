"""Value shapes of other servers, and what they are here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkllama_server.api.dialect.shaped import DialectError, Shape, Shaped
from chunkllama_server.api.dialect.tool_shapes import (
    chat_tool_choice,
    chat_tools,
    response_tool_choice,
    response_tools,
)
from chunkllama_server.api.schema.past import as_text
from chunkllama_server.api.schema.spellings import as_flag, as_number

_JSON_TYPES = ("json", "json_object", "json_schema", "object")
_FLAGS = ("name", "description", "strict")
_SCHEMA_MEMBERS = ("schema", "value", "json_schema", "response_schema", "schema_")
_SCHEMA_WORDS = frozenset(
    ("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "$defs")
)
_OBJECT_WORDS = frozenset(("required", "additionalProperties", "patternProperties"))


def token_limit(value: Any, target: str) -> dict[str, Any]:
    """A limit of the answer; -1 and -2 (as much as fits) are no limit."""
    return {} if as_number(value) in (-1, -2) else {target: value}


def no_limit(value: Any) -> Shaped:
    """An own limit of tokens; -1 and -2 are none."""
    return Shaped(token_limit(value, "").get(""))


def completion_limit(value: Any) -> Shaped:
    """A text completion's limit; without a field 16 tokens are generated, so that none is -1."""
    return Shaped(-1 if as_number(value) == -2 else value)


def thinks(wants: bool) -> dict[str, Any]:
    """Template arguments that turn thoughts on or off."""
    names = ("enable_thinking", "thinking")
    return {f"chat_template_kwargs.{name}": wants for name in names}


_EFFORTS = {"auto": None, "default": None, "off": "none", "disabled": "none"}
_TIERS = dict.fromkeys(("standard", "standard_only", "on_demand"), "default")


def effort_word(value: Any) -> Shaped:
    """How much to think, in any case; ``auto`` and ``default`` leave it to the model."""
    if not isinstance(value, str):
        return Shaped(value)
    word = value.strip().lower()
    return Shaped(_EFFORTS.get(word, word))


def service_tier(value: Any) -> Shaped:
    """A service tier, by the names that Anthropic and Groq have for the ordinary one."""
    return Shaped(_TIERS.get(value, value) if isinstance(value, str) else value)


def metadata(value: Any) -> Shaped:
    """Notes of the client, whose values are texts here: other data is its JSON text."""
    if not isinstance(value, dict):
        return Shaped(value)
    return Shaped({name: as_text(item) for name, item in value.items() if item is not None})


def chat_logprobs(value: Any) -> Shaped:
    """Chat's flag, also as 0 or 1; a higher number is that of ``top_logprobs``, too."""
    count = as_number(value)
    if type(count) is not int or count < 0:
        return Shaped(value)
    return Shaped(count > 0, {}, {"top_logprobs": ("", count)} if count > 1 else {})


def logprob_count(value: Any) -> Shaped:
    """A number of log-probabilities; the flag of chat is one, or none."""
    given = value if type(value) is int else as_flag(value)
    return Shaped(1 if given is True else None if given is False else value)


def template_kwargs(value: Any) -> Shaped:
    """Variables of the template; the text "false" of a switch would be true in it."""
    if not isinstance(value, dict):
        return Shaped(value)
    switches = {"enable_thinking", "thinking"}
    return Shaped({k: as_flag(item) if k in switches else item for k, item in value.items()})


def response_reasoning(value: Any) -> Shaped:
    """``reasoning`` of a Responses request with the members that OpenRouter adds."""
    if not isinstance(value, dict):
        return Shaped(value)
    also: dict[str, tuple[str, Any]] = {}
    rest = {name: item for name, item in value.items() if name not in ("enabled", "max_tokens")}
    if "effort" in rest:
        rest["effort"] = effort_word(rest["effort"]).value
    if (wants := as_flag(value.get("enabled"))) is not None:
        if not isinstance(wants, bool):
            raise DialectError("must be true or false", "enabled")
        also = {target: (".enabled", meaning) for target, meaning in thinks(wants).items()}
    for target, budget in token_limit(value.get("max_tokens"), "thinking_token_budget").items():
        if budget is not None:
            also[target] = (".max_tokens", budget)
    return Shaped(rest or None, {}, also)


def constraint(value: Any) -> dict[str, Any]:
    """A grammar: GBNF or Lark text, or an object of a type and a value."""
    if isinstance(value, str):
        return {"structured_outputs.grammar": value} if value.strip() else {}
    if not isinstance(value, dict):
        raise DialectError("must be a grammar's text, or an object of type and value")
    kinds = {"json": "json", "json_schema": "json", "json_object": "json", "regex": "regex"}
    kind = kinds.get(str(value.get("type")))
    if kind is None or "value" not in value:
        raise DialectError("must have the type json, json_schema or regex, and a value")
    inner = value["value"]
    if kind == "json" and isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
        inner = inner["schema"]
    return {f"structured_outputs.{kind}": inner}


def answer_format(value: Any) -> dict[str, Any]:
    """Ollama's format: "json", or a schema."""
    if value == "":
        return {}
    if value == "json":
        return {"structured_outputs.json_object": True}
    if isinstance(value, dict):
        return {"structured_outputs.json": value}
    raise DialectError('must be "json" or a JSON schema')


def bias_values(value: Any) -> Shaped:
    """A map of token ids to numbers, which may be texts, or llama.cpp's list of [token id, bias],
    in which false is -100."""
    if isinstance(value, dict):
        return Shaped({token: as_number(bias) for token, bias in value.items()})
    if not isinstance(value, list):
        return Shaped(value)
    bias: dict[str, Any] = {}
    for index, pair in enumerate(value):
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, str)):
            raise DialectError("must be a token id and a bias", f"[{index}]")
        bias[str(pair[0])] = -100 if pair[1] is False else as_number(pair[1])
    return Shaped(bias)


def response_format(value: Any) -> Shaped:
    """A response format of chat, with the schema, regex or grammar wherever clients put it."""
    if value in ("", {}):
        return Shaped(None)
    if (outputs := _constrained(value)) is not None:
        return Shaped(None, {}, outputs)
    found = _schema_in(value)
    if found is None:
        return Shaped({"type": value} if isinstance(value, str) else value)
    if found.kind == "json_object":
        return Shaped({"type": found.kind, **found.rest})
    described = {**found.flags, "schema": found.schema}
    shaped = {"type": found.kind, "json_schema": described, **found.rest}
    return Shaped(shaped, {".json_schema.schema": found.path})


def text_options(value: Any) -> Shaped:
    """``text`` of a Responses request, whose format may be in the shape of chat."""
    if not isinstance(value, dict) or value.get("format") is None:
        return Shaped(value)
    given = value["format"]
    if (outputs := _constrained(given)) is not None:
        rest = {name: item for name, item in value.items() if name != "format"}
        also = {target: (f".format{path}", item) for target, (path, item) in outputs.items()}
        return Shaped(rest, {}, also)
    shaped, path = _flat_format(given)
    return Shaped({**value, "format": shaped}, {".format.schema": f".format{path}"})


def text_format_of(value: Any) -> dict[str, Any]:
    """The fields of a Responses request that say what chat's response_format says."""
    if (outputs := _constrained(value)) is not None:
        return {target: item for target, (_, item) in outputs.items()}
    return {"text.format": _flat_format(value)[0]}


def chat_format_of(value: Any) -> dict[str, Any]:
    """The fields of chat that say what ``text`` of a Responses request says."""
    if not isinstance(value, dict):
        raise DialectError("must be an object with format or verbosity")
    meanings: dict[str, Any] = {}
    if value.get("format") is not None:
        shaped = response_format(value["format"])
        meanings = {target: item for target, (_, item) in shaped.also.items()}
        if shaped.value is not None:
            meanings["response_format"] = shaped.value
    if value.get("verbosity") is not None:
        meanings["verbosity"] = value["verbosity"]
    return meanings


@dataclass(frozen=True, slots=True)
class _FoundSchema:
    """A format's type and schema, the client's path of the schema, and the other members."""

    kind: str
    path: str = ""
    schema: Any = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)


def _flat_format(value: Any) -> tuple[Any, str]:
    """A format in the flat shape of the Responses API, and the client's path of its schema."""
    found = _schema_in(value)
    if found is None:
        return ({"type": value} if isinstance(value, str) else value), ".schema"
    if found.kind == "json_object":
        return {"type": found.kind, **found.rest}, ""
    return {"type": found.kind, **found.flags, "schema": found.schema, **found.rest}, found.path


def _schema_in(value: Any) -> _FoundSchema | None:
    """The schema of a JSON format; None for another format, or one without its schema."""
    if _is_bare(value):
        return _FoundSchema("json_schema", "", value)
    given = {"type": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get("type") not in _JSON_TYPES:
        return None
    flags = {name: given[name] for name in _FLAGS if given.get(name) is not None}
    known = {"type", *_FLAGS, *_SCHEMA_MEMBERS}
    rest = {name: item for name, item in given.items() if name not in known}
    for name in _SCHEMA_MEMBERS:
        content, path = given.get(name), f".{name}"
        if isinstance(content, str):
            content = _read_schema(content, name)
        if isinstance(content, dict) and _describes_schema(content):
            inner = {key: item for key, item in content.items() if key != "schema"}
            path, flags, content = f"{path}.schema", {**flags, **inner}, content["schema"]
            if isinstance(content, str):
                content = _read_schema(content, f"{name}.schema")
        elif name == "json_schema" and (
            not isinstance(content, dict) or _SCHEMA_WORDS.isdisjoint(content)
        ):
            continue  # not a schema: a description that lacks one
        if content:
            return _FoundSchema("json_schema", path, content, flags, rest)
    return None if given["type"] == "json_schema" else _FoundSchema("json_object", rest=rest)


def _is_bare(value: Any) -> bool:
    """Whether a format is a schema itself."""
    if not isinstance(value, dict) or {*_SCHEMA_MEMBERS, "json_schema"} & value.keys():
        return False
    kind = value.get("type")
    kind = kind.lower() if isinstance(kind, str) else kind  # Gemini's types are in capitals
    if kind == "object":
        return bool(value.keys() & (_SCHEMA_WORDS - {"type"}) | (value.keys() & _OBJECT_WORDS))
    if isinstance(kind, list) or kind in ("array", "string", "integer", "number", "boolean"):
        return True
    return kind is None and not _SCHEMA_WORDS.isdisjoint(value)


def _read_schema(text: str, member: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DialectError("must be a JSON schema", member) from None


def _describes_schema(content: Mapping[str, Any]) -> bool:
    """Whether an object holds a schema with its name, rather than being one."""
    return isinstance(content.get("schema"), dict | str) and _SCHEMA_WORDS.isdisjoint(content)


def _constrained(value: Any) -> Mapping[str, tuple[str, Any]] | None:
    """The structured_outputs of a format of type regex, grammar or choice; None for another."""
    if not isinstance(value, dict):
        return None
    kind = {"regex": "regex", "choice": "choice"}.get(str(value.get("type")))
    if value.get("type") in ("grammar", "ebnf", "gbnf", "lark", "lark_grammar"):
        kind = "grammar"
    if kind is None:
        return None
    for name in ("value", "regex", "pattern", "grammar", "ebnf", "choice", "choices"):
        if value.get(name) is not None:
            return {f"structured_outputs.{kind}": (f".{name}", value[name])}
    raise DialectError(f"needs {kind}", kind)


def structured_outputs(value: Any) -> Shaped:
    """vLLM's structured_outputs: options of its grammar engines have no effect here."""
    if not isinstance(value, dict):
        return Shaped(value)
    for name in ("whitespace_pattern", "disable_any_whitespace"):
        if value.get(name):
            raise DialectError("is not supported: white space is fixed", name)
    dropped = {
        *("whitespace_pattern", "disable_any_whitespace", "disable_fallback"),
        *("disable_additional_properties", "backend"),
    }
    return Shaped({name: item for name, item in value.items() if name not in dropped})


# Members of a last message that ask to continue it (Mistral and DeepSeek; Qwen and Moonshot).
_PREFIXES = ("prefix", "partial")


def messages(value: Any) -> Shaped:
    """A last message of the assistant with ``prefix: true`` or ``partial: true`` is continued."""
    last = value[-1] if isinstance(value, list) and value else None
    given = [name for name in _PREFIXES if isinstance(last, dict) and last.get(name) is True]
    if not given or not isinstance(last, dict):
        return Shaped(value)
    path = f"[{len(value) - 1}].{given[0]}"
    if str(last.get("role")).strip().lower() != "assistant":
        raise DialectError("is for a message of the assistant", path)
    rest = {name: item for name, item in last.items() if name not in _PREFIXES}
    also = {"continue_final_message": (path, True), "add_generation_prompt": (path, False)}
    return Shaped([*value[:-1], rest], {}, also)


SHAPES: Mapping[tuple[str, str], Shape] = {
    ("chat", "messages"): messages,
    ("chat", "response_format"): response_format,
    ("completions", "response_format"): response_format,
    ("responses", "text"): text_options,
    ("responses", "reasoning"): response_reasoning,
    ("responses", "max_output_tokens"): no_limit,
    ("chat", "max_tokens"): no_limit,
    ("chat", "max_completion_tokens"): no_limit,
    ("chat", "thinking_token_budget"): no_limit,
    ("responses", "thinking_token_budget"): no_limit,
    ("completions", "max_tokens"): completion_limit,
    ("chat", "logprobs"): chat_logprobs,
    ("completions", "logprobs"): logprob_count,
    ("chat", "prompt_logprobs"): logprob_count,
    ("completions", "prompt_logprobs"): logprob_count,
    ("chat", "reasoning_effort"): effort_word,
    **{
        (endpoint, name): shape
        for endpoint in ("chat", "responses")
        for name, shape in (
            ("chat_template_kwargs", template_kwargs),
            ("metadata", metadata),
            ("service_tier", service_tier),
        )
    },
    **{
        (endpoint, name): shape
        for endpoint in ("chat", "completions", "responses")
        for name, shape in (
            ("logit_bias", bias_values),
            ("structured_outputs", structured_outputs),
            ("truncate_prompt_tokens", no_limit),
        )
    },
    ("chat", "tools"): chat_tools,
    ("tokenize", "tools"): chat_tools,
    ("responses", "tools"): response_tools,
    ("chat", "tool_choice"): chat_tool_choice,
    ("responses", "tool_choice"): response_tool_choice,
}
