"""Tools and tool_choice: what the template shows, what a grammar forces, how the output is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.template_adapter import template_tool
from chunkllama_server.api.common.lark_cost import check_lark_cost
from chunkllama_server.api.common.schema_bounds import bounded
from chunkllama_server.api.common.schema_levels import object_schema, prepare_schema
from chunkllama_server.api.common.schema_relaxing import SchemaSource
from chunkllama_server.api.common.structured_outputs import check_schema
from chunkllama_server.api.schema.chat import (
    ChatCompletionRequest,
    ChatTool,
    FunctionDefinition,
    NamedToolChoice,
)
from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.call_grammar import calls_or_answer, forced_calls
from chunkllama_server.api.tools.parsers import CallReader, OutputParser, PlainText
from chunkllama_server.api.tools.raw_input import RawInput
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded, invalid


@dataclass(frozen=True, slots=True)
class ToolConfig:
    """How one request uses tools.

    Attributes:
        prompt_tools: tools for the template, None to show none.
        call_schemas: a schema of each call, for grammars of calls or an answer.
        sources: where the schemas of their arguments come from.
        left_out: paths of schema keywords that forced calls do not enforce.
        functions: functions the model may call, with their parameters.
        is_forced: calls are required, or one is named.
        input_grammar: of a custom tool's input, which then is the whole answer.
        max_calls: 1 without parallel calls, else None.
        format: how the model writes calls.
        is_legacy: the client used ``functions``, so it is answered with ``function_call``.
    """

    prompt_tools: list[dict[str, Any]] | None = None
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_forced: bool = False
    input_grammar: GrammarSpec | None = None
    call_schemas: tuple[dict[str, Any], ...] = ()
    sources: tuple[SchemaSource, ...] = ()
    left_out: tuple[str, ...] = ()
    max_calls: int | None = None
    format: CallFormat = field(default_factory=CallFormat)
    is_legacy: bool = False

    def parser(self) -> OutputParser:
        """A fresh parser for one choice."""
        addressed = self.format.family == "functionary" and ">>>" in self.format.markers
        if not self.functions and not addressed:
            return PlainText()
        if self.input_grammar is not None:
            return RawInput(next(iter(self.functions)))
        return CallReader(
            self.functions,
            self.format.tags,
            hidden=frozenset(self.format.special.values()),
            bare_python=self.format.family == "pythonic",
            forced=self.is_forced,
            max_calls=self.max_calls,
            addressed=addressed,
        )

    def with_arguments(self, schemas: Sequence[Any]) -> ToolConfig:
        """The same with other schemas of the calls' arguments, in the order of ``sources``."""
        names = (call["properties"]["name"]["const"] for call in self.call_schemas)
        return replace(self, call_schemas=tuple(map(_call_schema, names, schemas)))

    def bounded(self, num_tokens: int, *, patterns: bool = True) -> ToolConfig:
        """The same with schemas of calls that end within a number of output tokens.

        Args:
            patterns: bound texts that match a pattern, too.
        """
        given = [call["properties"]["arguments"] for call in self.call_schemas]
        arguments = [bounded(schema, num_tokens, patterns=patterns) for schema in given]
        return self.with_arguments(arguments)

    def grammar(
        self, answer: GrammarSpec | None = None, limits: LimitsConfig = DEFAULT_LIMITS
    ) -> GrammarSpec | None:
        """The grammar of the output: of forced calls, else of calls or the typed answer.

        Args:
            answer: of a typed answer; None for free text.

        Raises:
            ApiError: 400 where the functions' schemas are too large together.
        """
        if self.input_grammar is not None:
            return self.input_grammar
        single, schemas = self.max_calls == 1, self.call_schemas
        if self.is_forced:
            return forced_calls(self.format, schemas, is_single=single, limits=limits)
        if answer is None or not self.functions:
            return answer
        return calls_or_answer(self.format, schemas, answer, is_single=single, limits=limits)

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the parser has to see."""
        return frozenset(self.format.special) if self.functions else frozenset()


def _call_schema(name: str, arguments: Any) -> dict[str, Any]:
    """The schema of one call."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _functions(body: ChatCompletionRequest) -> list[tuple[str, FunctionDefinition]]:
    """Each function with the path of its parameters."""
    if body.functions is not None:
        if body.tools is not None and not _are_tools(body.functions, body.tools):
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


def _by_name(functions: list[tuple[str, FunctionDefinition]]) -> dict[str, FunctionDefinition]:
    by_name: dict[str, FunctionDefinition] = {}
    for path, function in functions:
        if function.name in by_name:
            where = f"{path.removesuffix('.parameters')}.name"
            raise invalid(f"{function.name!r} is the name of an earlier tool", where)
        by_name[function.name] = function
    return by_name


def _are_tools(functions: list[FunctionDefinition], tools: list[ChatTool]) -> bool:
    """Whether functions are the same as tools, for servers of either kind."""
    return functions == [tool.function for tool in tools if not tool.is_skipped()]


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
        return ToolConfig(format=output_format)
    mode, allowed, chosen = _choice(body)
    by_name = _by_name(functions)
    if allowed is not None:
        for name in allowed:
            if name not in by_name:
                words = ", nor is it auto, none or required" if chosen.endswith(".name") else ""
                raise invalid(f"{name!r} is not among the tools{words}", chosen)
        by_name = {name: by_name[name] for name in allowed}
    by_path = {path: function for path, function in functions if function.name in by_name}
    # The prompt shows the same tools for any tool_choice, so that its prefix stays cached.
    prompt_tools = [template_tool(dict(function)) for _, function in functions]
    if mode == "none":
        return ToolConfig(prompt_tools=prompt_tools, format=output_format)
    is_single = (
        body.parallel_tool_calls is False or body.functions is not None or chosen.endswith(".name")
    )
    input_grammar = _input_grammar(by_path, limits) if mode == "required" else None
    # Schemas of calls that nothing constrains are only shown.
    constrained = by_path if mode == "required" or has_typed_answer(body) else {}
    left_out = [] if input_grammar is not None else _shown_formats(by_path, bool(constrained))
    sources = [
        _arguments(function, where, left_out, limits) for where, function in constrained.items()
    ]
    names = (function.name for function in constrained.values())
    return ToolConfig(
        prompt_tools=prompt_tools,
        functions={name: function.parameters or {} for name, function in by_name.items()},
        is_forced=mode == "required",
        input_grammar=input_grammar,
        call_schemas=tuple(_call_schema(n, s.schema) for n, s in zip(names, sources, strict=True)),
        sources=tuple(sources),
        left_out=tuple(left_out),
        max_calls=1 if is_single else None,
        format=output_format,
        is_legacy=body.functions is not None,
    )


def has_typed_answer(body: ChatCompletionRequest) -> bool:
    """Whether the answer, beside calls, is JSON."""
    outputs, given = body.structured_outputs, body.response_format
    is_json = outputs is not None and (outputs.json_ is not None or bool(outputs.json_object))
    return is_json or (given is not None and given.type != "text")


def _arguments(
    function: FunctionDefinition, path: str, left_out: list[str], limits: LimitsConfig
) -> SchemaSource:
    """The arguments of a call: always an object with its required members.

    Raises:
        ApiError: 400 for parameters that are too large, or strict and not enforceable.
    """
    parameters = object_schema(function.parameters)
    check_schema(parameters, path, limits)
    owner = f"the function {function.name!r}"
    prepared = prepare_schema(
        parameters,
        path,
        strict=bool(function.strict),
        is_call=True,
        owner=owner,
        limits=limits,
    )
    left_out += prepared.left_out
    strict = bool(function.strict)
    return SchemaSource(prepared.schema, path, owner, is_strict=strict, is_call=True)


def _input_grammar(
    functions: Mapping[str, FunctionDefinition], limits: LimitsConfig
) -> GrammarSpec | None:
    """The Lark grammar of the only function that may be called, which is a custom tool.

    A grammar of text cannot hold inside the JSON text of a call, so the answer is the input.

    Raises:
        ApiError: 400 for a grammar that is too large or whose repeats make each token slow.
    """
    if len(functions) != 1:
        return None
    ((path, function),) = functions.items()
    given = function.input_format
    if given is None or given.syntax != "lark":
        return None
    param = _format_path(path)
    if not given.definition or len(given.definition) > limits.max_grammar_chars:
        raise exceeded(limits, "max_grammar_chars", param, value=len(given.definition))
    check_lark_cost(given.definition, param, limits)
    return GrammarSpec(kind="lark", text=given.definition)


def _shown_formats(functions: Mapping[str, FunctionDefinition], is_constrained: bool) -> list[str]:
    """Paths of formats of custom tools that the model sees and no grammar enforces.

    A regular expression is part of the schema of the call, so it is enforced where the schema is.
    """
    return [
        _format_path(path)
        for path, function in functions.items()
        if function.input_format is not None
        and not (is_constrained and function.input_format.syntax == "regex")
    ]


def _format_path(path: str) -> str:
    return path.replace("function.parameters", "format")
