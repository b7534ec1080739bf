"""Value shapes of other servers, and what they are here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_JSON_TYPES = ("json", "json_object", "json_schema", "object")
_FLAGS = ("name", "description", "strict")
_FUNCTION_MEMBERS = ("name", "description", "parameters", "strict")
_SCHEMA_MEMBERS = ("schema", "value", "json_schema", "response_schema", "schema_")
_SCHEMA_WORDS = frozenset(
    ("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "$defs")
)


@dataclass(frozen=True, slots=True)
class Shaped:
    """A value in this server's shape.

    Attributes:
        value: None leaves the field out.
        renamed: paths below the field that moved: ours to the client's.
        also: other fields that the value sets, each with the client's path below the field.
    """

    value: Any
    renamed: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


Shape = Callable[[Any], Shaped]


class DialectError(ValueError):
    """A value that has no meaning here; the message continues the field's path."""

    def __init__(self, message: str, member: str = "") -> None:
        super().__init__(message)
        self.member = member


def token_limit(value: Any, target: str) -> dict[str, Any]:
    """A limit of the answer; -1 and -2 (as much as fits) are no limit."""
    if type(value) is int and value in (-1, -2):
        return {}
    return {target: value}


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


def bias_pairs(value: Any) -> Shaped:
    """llama.cpp's list of [token id, bias] as a map; false is -100."""
    if not isinstance(value, list):
        return Shaped(value)
    bias: dict[str, Any] = {}
    for index, pair in enumerate(value):
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, str)):
            raise DialectError("must be a token id and a bias", f"[{index}]")
        bias[str(pair[0])] = -100 if pair[1] is False else pair[1]
    return Shaped(bias)


def response_format(value: Any) -> Shaped:
    """A response format of chat, with the schema, regex or grammar wherever clients put it."""
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
        elif name == "json_schema" and (
            not isinstance(content, dict) or _SCHEMA_WORDS.isdisjoint(content)
        ):
            continue  # not a schema: a description that lacks one
        if content:
            return _FoundSchema("json_schema", path, content, flags, rest)
    return None if given["type"] == "json_schema" else _FoundSchema("json_object", rest=rest)


def _read_schema(text: str, member: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DialectError("must be a JSON schema", member) from None


def _describes_schema(content: Mapping[str, Any]) -> bool:
    """Whether an object holds a schema with its name, rather than being one."""
    return isinstance(content.get("schema"), dict) and _SCHEMA_WORDS.isdisjoint(content)


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


def messages(value: Any) -> Shaped:
    """A last message of the assistant with ``prefix: true`` (Mistral, DeepSeek) is continued."""
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, dict) or last.get("prefix") is not True:
        return Shaped(value)
    if last.get("role") != "assistant":
        raise DialectError("is for a message of the assistant", f"[{len(value) - 1}].prefix")
    rest = {name: item for name, item in last.items() if name != "prefix"}
    path = f"[{len(value) - 1}].prefix"
    also = {"continue_final_message": (path, True), "add_generation_prompt": (path, False)}
    return Shaped([*value[:-1], rest], {}, also)


def chat_tools(value: Any) -> Shaped:
    """Tools in the flat shape of the Responses API, or in Anthropic's, nested as chat has them."""
    return _each_tool(value, _nested_tool)


def response_tools(value: Any) -> Shaped:
    """Tools in the shape of chat or Anthropic's, flat as the Responses API has them."""
    return _each_tool(value, _flat_tool)


def _each_tool(
    value: Any, change: Callable[[dict[str, Any]], tuple[dict[str, Any], Mapping[str, str]]]
) -> Shaped:
    if not isinstance(value, list):
        return Shaped(value)
    tools: list[Any] = []
    renamed: dict[str, str] = {}
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            tools.append(tool)
            continue
        changed, inner = change(tool)
        tools.append(changed)
        renamed.update({f"[{index}]{ours}": f"[{index}]{theirs}" for ours, theirs in inner.items()})
    return Shaped(tools, renamed)


def _is_function(tool: Mapping[str, Any]) -> bool:
    """A tool is a function by its type; without one, or with Anthropic's "custom", by its
    members."""
    kind = tool.get("type")
    if kind == "custom":
        return "input_schema" in tool
    if kind is None:
        return bool({"function", "input_schema", "parameters"} & tool.keys())
    return bool(kind == "function")


def _described(tool: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Name, description, parameters and strict of a flat tool, and the client's name of each."""
    members = {name: tool[name] for name in _FUNCTION_MEMBERS if name in tool}
    paths = {name: name for name in members}
    if "input_schema" in tool and "parameters" not in tool:
        members["parameters"], paths["parameters"] = tool["input_schema"], "input_schema"
    return members, paths


def _nested_tool(tool: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    if not _is_function(tool):
        return tool, {}
    known = {"type", "function", *_FUNCTION_MEMBERS, "input_schema"}
    rest = {name: item for name, item in tool.items() if name not in known}
    function, paths = _described(tool)
    inner = tool.get("function")
    if "function" in tool and not isinstance(inner, dict):
        return tool, {}
    if not function and inner is None:
        return tool, {}
    merged = {**function, **(inner or {})}
    renamed = {
        f".function.{name}": f".{path}" for name, path in paths.items() if name not in (inner or {})
    }
    return {"type": "function", "function": merged, **rest}, renamed


def _flat_tool(tool: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    if not _is_function(tool):
        return tool, {}
    rest = {name: item for name, item in tool.items() if name not in ("function", "input_schema")}
    inner = tool.get("function")
    if isinstance(inner, dict):
        renamed = {f".{name}": f".function.{name}" for name in inner}
        return {**rest, **inner, "type": "function"}, renamed
    function, paths = _described(tool)
    return {**rest, **function, "type": "function"}, {f".{o}": f".{t}" for o, t in paths.items()}


def chat_tool_choice(value: Any) -> Shaped:
    """A tool choice of the Responses API, Mistral ("any") or Anthropic as one of chat."""
    plain = _plain_choice(value)
    if plain is not None or not isinstance(value, dict):
        return Shaped(value if plain is None else plain)
    kind = value.get("type")
    if kind in ("function", "tool") and "name" in value and "function" not in value:
        choice = {"type": "function", "function": {"name": value["name"]}}
        return Shaped(choice, {".function.name": ".name"})
    if kind is None and isinstance(value.get("function"), dict):
        return Shaped({**value, "type": "function"})
    if kind == "allowed_tools" and isinstance(value.get("tools"), list):
        tools = [_nested_tool(t)[0] if isinstance(t, dict) else t for t in value["tools"]]
        allowed = {"mode": value.get("mode", "auto"), "tools": tools}
        renamed = {".allowed_tools.tools": ".tools", ".allowed_tools.mode": ".mode"}
        return Shaped({"type": "allowed_tools", "allowed_tools": allowed}, renamed)
    return Shaped(value)


def response_tool_choice(value: Any) -> Shaped:
    """A tool choice of chat, Mistral or Anthropic as one of the Responses API."""
    plain = _plain_choice(value)
    if plain is not None or not isinstance(value, dict):
        return Shaped(value if plain is None else plain)
    inner = value.get("function")
    if value.get("type") in (None, "function") and isinstance(inner, dict):
        return Shaped({"type": "function", "name": inner.get("name")}, {".name": ".function.name"})
    if value.get("type") == "tool":
        return Shaped({**value, "type": "function"})
    return Shaped(value)


def _plain_choice(value: Any) -> str | None:
    """A choice that is one word, whether written as a word or as an object of a type."""
    if value == "any":
        return "required"
    if isinstance(value, dict) and set(value) == {"type"}:
        words = {"any": "required", "auto": "auto", "none": "none", "required": "required"}
        return words.get(str(value["type"]))
    return None


SHAPES: Mapping[tuple[str, str], Shape] = {
    ("chat", "messages"): messages,
    ("chat", "response_format"): response_format,
    ("completions", "response_format"): response_format,
    ("responses", "text"): text_options,
    **{
        (endpoint, name): shape
        for endpoint in ("chat", "completions", "responses")
        for name, shape in (
            ("logit_bias", bias_pairs),
            ("structured_outputs", structured_outputs),
        )
    },
    ("chat", "tools"): chat_tools,
    ("tokenize", "tools"): chat_tools,
    ("responses", "tools"): response_tools,
    ("chat", "tool_choice"): chat_tool_choice,
    ("responses", "tool_choice"): response_tool_choice,
}
