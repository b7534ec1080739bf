"""Tools and tool_choice: what the template shows, what a grammar forces, how the output is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from chunkllama.engine.grammar import JSON_WHITESPACE
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.template_adapter import template_tool
from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.schema_bounds import bound_grammar, bounded
from chunkllama_server.api.common.schema_levels import object_schema, prepare_schema
from chunkllama_server.api.common.structured_outputs import check_schema
from chunkllama_server.api.schema.chat import (
    ChatCompletionRequest,
    FunctionDefinition,
    NamedToolChoice,
)
from chunkllama_server.api.tools.families import (
    FAMILY_TAGS,
    CallTags,
    all_tags,
    special_tags,
    tool_family,
)
from chunkllama_server.api.tools.parsers import CallReader, OutputParser, PlainText
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.config.settings import ToolFamily as Family
from chunkllama_server.transport.errors import exceeded, invalid

# Families that write calls as a list behind a tag.
_LIST_TAGS: dict[Family, str] = {
    "mistral": "[TOOL_CALLS]",
    "granite": "<|tool_call|>",
    "phi4_mini_json": "<|tool_call|>",
}
# A weak model under a grammar may never close the list by itself.
MAX_FORCED_CALLS = 16


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How the model writes calls.

    Attributes:
        family: decides the form of calls in a grammar.
        tags: what begins and ends calls in the output.
        special: the tags that are special tokens, by id; decoding has to show them.
    """

    family: Family = "hermes"
    tags: CallTags = FAMILY_TAGS["hermes"]
    special: Mapping[int, str] = field(default_factory=dict)

    def terminal(self, tag: str) -> str:
        """A tag as a grammar has it: by its id where it is a special token."""
        token_id = next((i for i, special in self.special.items() if special == tag), None)
        return json.dumps(tag) if token_id is None else f"<[{token_id}]>"


def call_format(
    configured: Family | None, able: TemplateCapabilities | None, tokenizer: Tokenizer
) -> CallFormat:
    """The form of the model's calls; a configured family restricts reading to its own tags."""
    family = tool_family(configured, able, tokenizer)
    tags = FAMILY_TAGS[family] if configured is not None else all_tags(family)
    return CallFormat(family, tags, special_tags(tags, tokenizer))


@dataclass(frozen=True, slots=True)
class ToolConfig:
    """How one request uses tools.

    Attributes:
        prompt_tools: tools for the template, None to show none.
        call_schemas: a schema of each call, for grammars of calls or an answer.
        left_out: paths of schema keywords that forced calls do not enforce.
        functions: functions the model may call, with their parameters.
        grammar: forces calls, when they are required or one is named.
        max_calls: 1 without parallel calls, else None.
        format: how the model writes calls.
        is_legacy: the client used ``functions``, so it is answered with ``function_call``.
    """

    prompt_tools: list[dict[str, Any]] | None = None
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grammar: GrammarSpec | None = None
    call_schemas: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()
    max_calls: int | None = None
    format: CallFormat = field(default_factory=CallFormat)
    is_legacy: bool = False

    def parser(self) -> OutputParser:
        """A fresh parser for one choice."""
        if not self.functions:
            return PlainText()
        return CallReader(
            self.functions,
            self.format.tags,
            hidden=frozenset(self.format.special.values()),
            bare_python=self.format.family == "pythonic",
            forced=self.grammar is not None,
            max_calls=self.max_calls,
        )

    def bounded(self, num_tokens: int) -> ToolConfig:
        """The same with schemas of calls that end within a number of output tokens."""
        grammar = None if self.grammar is None else bound_grammar(self.grammar, num_tokens)
        schemas = tuple(bounded(schema, num_tokens) for schema in self.call_schemas)
        return replace(self, grammar=grammar, call_schemas=schemas)

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the parser has to see."""
        return frozenset(self.format.special) if self.functions else frozenset()


def _functions(body: ChatCompletionRequest) -> list[tuple[str, FunctionDefinition]]:
    """Each function with the path of its parameters."""
    if body.functions is not None:
        if body.tools is not None:
            raise invalid("Send tools or functions, not both", "functions")
        return [
            (f"functions[{index}].parameters", function)
            for index, function in enumerate(body.functions)
        ]
    functions = []
    for index, tool in enumerate(body.tools or ()):
        if tool.is_skipped():
            continue
        if tool.function is None:
            raise invalid("A function tool needs function", f"tools[{index}].function")
        functions.append((f"tools[{index}].function.parameters", tool.function))
    return functions


def _choice(body: ChatCompletionRequest) -> tuple[str, Iterable[str] | None, str]:
    """Mode (none, auto, required), the names allowed (None for all), and the field's path."""
    if body.functions is not None:
        legacy = body.function_call
        if legacy is None or isinstance(legacy, str):
            return legacy or "auto", None, "function_call"
        return "required", [legacy.name], "function_call.name"
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto", None, "tool_choice"
    return _named_choice(choice)


def _named_choice(choice: NamedToolChoice) -> tuple[str, Iterable[str] | None, str]:
    if choice.type == "function" and choice.function is not None:
        return "required", [choice.function.name], "tool_choice.function.name"
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        names = []
        for index, tool in enumerate(choice.allowed_tools.tools):
            function = tool.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str):
                raise invalid(
                    "An allowed tool is {type: function, function: {name}}",
                    f"tool_choice.allowed_tools.tools[{index}]",
                )
            names.append(name)
        return choice.allowed_tools.mode, names, "tool_choice.allowed_tools.tools"
    raise invalid(f"tool_choice of type {choice.type!r} needs its function", "tool_choice")


def plan_tools(
    body: ChatCompletionRequest, output_format: CallFormat, limits: LimitsConfig = DEFAULT_LIMITS
) -> ToolConfig:
    """Check tools and tool_choice against each other.

    Raises:
        ApiError: 400 for custom tools, duplicate or unknown names, or a choice without tools.
    """
    functions = _functions(body)
    if not functions:
        for field in ("tool_choice", "function_call"):
            if getattr(body, field) not in (None, "none", "auto"):
                raise invalid(f"{field} needs tools", field)
        return ToolConfig()
    mode, allowed, path = _choice(body)
    by_name = {function.name: function for _, function in functions}
    if len(by_name) < len(functions):
        raise invalid("Two tools have the same name", "tools")
    if allowed is not None:
        for name in allowed:
            if name not in by_name:
                raise invalid(f"{name!r} is not among the tools", path)
        by_name = {name: by_name[name] for name in allowed}
    by_path = {path: function for path, function in functions if function.name in by_name}
    # The prompt shows the same tools whatever tool_choice says, so that its prefix stays cached.
    prompt_tools = [template_tool(dict(function)) for _, function in functions]
    if mode == "none":
        return ToolConfig(prompt_tools=prompt_tools)
    is_single = (
        body.parallel_tool_calls is False or body.functions is not None or path.endswith(".name")
    )
    left_out: list[str] = []
    # Schemas of calls that nothing constrains are only shown.
    has_answer = body.response_format is not None and body.response_format.type != "text"
    constrained = by_path if mode == "required" or has_answer else {}
    schemas = [
        _call_schema(function, where, left_out, limits) for where, function in constrained.items()
    ]
    return ToolConfig(
        prompt_tools=prompt_tools,
        functions={name: function.parameters or {} for name, function in by_name.items()},
        grammar=forced_calls(schemas, is_single, limits) if mode == "required" else None,
        call_schemas=tuple(schemas),
        left_out=tuple(left_out),
        max_calls=1 if is_single else None,
        format=output_format,
        is_legacy=body.functions is not None,
    )


def _call_schema(
    function: FunctionDefinition, path: str, left_out: list[str], limits: LimitsConfig
) -> dict[str, Any]:
    """The schema of one call; its arguments are always an object with its required members.

    Raises:
        ApiError: 400 for parameters that are too large, or strict and not enforceable.
    """
    parameters = object_schema(function.parameters)
    check_schema(parameters, path, limits)
    owner = f"the function {function.name!r}"
    prepared = prepare_schema(parameters, path, strict=bool(function.strict), owner=owner)
    left_out += prepared.left_out
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": prepared.schema},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _any_call(schemas: Iterable[dict[str, Any]], pointer: str) -> dict[str, Any]:
    """A call of one of the functions, as a schema that stands at ``pointer`` of a larger one."""
    variants = []
    for index, schema in enumerate(schemas):
        place = f"{pointer}/anyOf/{index}/properties/arguments"
        properties = schema["properties"]
        arguments = _at(properties["arguments"], place)
        variants.append({**schema, "properties": {**properties, "arguments": arguments}})
    return {"anyOf": variants}


def forced_calls(
    schemas: Iterable[dict[str, Any]], is_single: bool, limits: LimitsConfig
) -> GrammarSpec:
    """A JSON schema for a list of calls, each one function's name with arguments of its schema.

    Raises:
        ApiError: 400 where the functions' schemas are too large.
    """
    schema = {
        "type": "array",
        "minItems": 1,
        "maxItems": 1 if is_single else MAX_FORCED_CALLS,
        "items": _any_call(schemas, "#/items"),
    }
    return GrammarSpec(kind="json_schema", text=check_schema(schema, "tools", limits))


def calls_or_answer(
    tools: ToolConfig, answer: GrammarSpec, limits: LimitsConfig = DEFAULT_LIMITS
) -> GrammarSpec:
    """A grammar of calls in the model's own format, or of a typed answer.

    Args:
        answer: a JSON schema, or any JSON object.

    Raises:
        ApiError: 400 where the functions' schemas are too large together.
    """
    schema = json.loads(answer.text) if answer.kind == "json_schema" else {"type": "object"}
    call = f"%json {_inline(_any_call(tools.call_schemas, '#'))}"
    calls = "call" if tools.max_calls == 1 else "call (/[;\\n]?/ call)*"
    if tools.format.family in ("hermes", "qwen3_coder"):
        first, last = (tools.format.terminal(tag) for tag in ("<tool_call>", "</tool_call>"))
        call = f"{first} /[ \\n]?/ {call} /[ \\n]?/ {last}"
    elif tools.format.family in _LIST_TAGS:
        more = "" if tools.max_calls == 1 else ' ("," call)*'
        tag = tools.format.terminal(_LIST_TAGS[tools.format.family])
        calls = f'{tag} "[" call{more} "]"'
    lines = ("start: calls | answer", f"calls: {calls}", f"call: {call}")
    text = "\n".join((*lines, f"answer: %json {_inline(schema)}"))
    if len(text) > 2 * limits.max_schema_chars:
        raise exceeded(limits, "max_schema_chars", "tools", value=len(text))
    return GrammarSpec(kind="lark", text=text)


def _inline(schema: dict[str, Any]) -> str:
    """A schema for a ``%json`` rule, with as little white space as a schema alone has."""
    return json.dumps({**schema, "x-guidance": {**JSON_WHITESPACE}})


def _at(schema: Any, pointer: str) -> Any:
    """A schema moved to ``pointer`` of a larger one: its ``#/...`` references move along."""
    if isinstance(schema, list):
        return [_at(item, pointer) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _at(value, pointer) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = pointer + reference[1:]
    return moved
