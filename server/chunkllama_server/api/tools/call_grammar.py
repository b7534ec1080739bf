"""Grammars of calls, in the form that the model's family writes, and of calls or a typed answer.

A forced call in the family's own form is what the model was taught to write and what the template
prints for it in the next turn, so the next prompt has the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkllama.engine.grammar_text import JSON_WHITESPACE
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.escaped_call import MARKS
from chunkllama_server.api.tools.parameter_grammar import (
    ParameterForm,
    escaped_rules,
    keyword_rules,
    parameter_rules,
)
from chunkllama_server.api.tools.parameter_tags import DSML, KEY_AND_VALUE
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded

# A weak model under a grammar may never end its calls by itself.
MAX_FORCED_CALLS = 16
_BLANK = "/[ \\n]?/"


@dataclass(frozen=True, slots=True)
class _Form:
    """The form of calls; tags in ``begin`` and the like are texts, a separator is Lark.

    Attributes:
        begin, end: around all calls.
        before, after: around one call.
        kind: ``object`` is JSON with name and arguments, ``named`` a name and then the arguments,
            ``python`` keyword arguments, ``parameters`` a tag for each parameter, ``escaped``
            members with texts between marks.
        between: behind the name of a named call.
        separator: between calls.
        arguments_key: of an object, the member that holds the arguments.
        function: around the parameters of a call; ``{}`` is the function's name.
        parameter: the form of each parameter.
    """

    begin: str = ""
    end: str = ""
    before: str = ""
    after: str = ""
    kind: str = "object"
    between: str = ""
    separator: str = ""
    arguments_key: str = "arguments"
    function: tuple[str, str] = ("<function={}>\n", "</function>")
    parameter: ParameterForm = field(default_factory=ParameterForm)

    @property
    def end_of_text(self) -> str | None:
        """Return what ends raw text."""
        return {"parameters": self.parameter.end, "escaped": MARKS[0]}.get(self.kind)


_TAGGED = _Form(before="<tool_call>", after="</tool_call>", separator="/\\n?/")
_COMMA = '"," / ?/'


def _form(written: CallFormat) -> _Form:
    """The form that the family's templates print."""
    markers = written.markers
    match written.family:
        case "llama3_json":
            return _Form(separator="/[;\\n]?/", arguments_key="parameters")
        case "mistral" if "[ARGS]" in markers:
            return _Form(before="[TOOL_CALLS]", kind="named", between="[ARGS]")
        case "mistral":
            return _Form("[TOOL_CALLS]", "]", separator=_COMMA)
        case "granite":
            return _Form("<|tool_call|>", "]", separator=_COMMA)
        case "phi4_mini_json":
            return _Form("<|tool_call|>", "]<|/tool_call|>", separator=_COMMA)
        case "deepseek_v3":
            return _Form(
                begin="<｜tool▁calls▁begin｜>",
                end="<｜tool▁calls▁end｜>",
                before="<｜tool▁call▁begin｜>",
                after="<｜tool▁call▁end｜>",
                kind="named",
                between="<｜tool▁sep｜>",
            )
        case "kimi_k2":
            return _Form(
                begin="<|tool_calls_section_begin|>",
                end="<|tool_calls_section_end|>",
                before="<|tool_call_begin|>functions.",
                after="<|tool_call_end|>",
                kind="named",
                between="<|tool_call_argument_begin|>",
            )
        case "functionary" if ">>>" in markers:
            # The prompt ends with the first of these.
            return _Form(kind="named", between="\n", separator='">>>"')
        case "functionary":
            return _Form(before="<function=", after="</function>", kind="named", between=">")
        case "pythonic":
            return _python_form(markers)
        case "qwen3_coder" if "<seed:tool_call>" in markers:
            return _Form(
                before="<seed:tool_call>\n",
                after="\n</seed:tool_call>",
                kind="parameters",
                separator="/\\n?/",
                parameter=ParameterForm("<parameter={0}>", "</parameter>\n"),
            )
    return _FORMS.get(written.family, _TAGGED)


_DSML = "｜DSML｜"
# Of the families that have one form.
_FORMS = {
    "qwen3_coder": _Form(
        before="<tool_call>\n", after="\n</tool_call>", kind="parameters", separator="/\\n?/"
    ),
    "minimax_m2": _Form(
        begin="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
        kind="parameters",
        function=('<invoke name="{}">\n', "</invoke>\n"),
        parameter=ParameterForm('<parameter name="{0}">', "</parameter>\n"),
    ),
    "deepseek_v32": _Form(
        begin=f"<{_DSML}function_calls>\n",
        end=f"</{_DSML}function_calls>",
        kind="parameters",
        function=(f'<{_DSML}invoke name="{{}}">\n', f"</{_DSML}invoke>\n"),
        parameter=ParameterForm(
            f'<{_DSML}parameter name="{{0}}" string="{{1}}">',
            f"</{_DSML}parameter>\n",
            DSML.value_ends,
        ),
    ),
    "glm45": _Form(
        before="<tool_call>",
        after="</tool_call>",
        kind="parameters",
        separator="/\\n?/",
        function=("{}\n", ""),
        parameter=ParameterForm(
            "<arg_key>{0}</arg_key>\n<arg_value>", "</arg_value>\n", KEY_AND_VALUE.value_ends
        ),
    ),
    "functiongemma": _Form(
        before="<start_function_call>call:", after="<end_function_call>", kind="escaped"
    ),
}


def _python_form(markers: frozenset[str]) -> _Form:
    if "<function_calls>" in markers:
        return _Form("<function_calls>", "</function_calls>", kind="python", separator="/\\n?/")
    for begin, end in (
        ("<|python_start|>", "<|python_end|>"),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ):
        if begin in markers:
            return _Form(f"{begin}[", f"]{end}", kind="python", separator=_COMMA)
    return _Form("[", "]", kind="python", separator=_COMMA)


def forced_calls(
    written: CallFormat,
    schemas: Sequence[dict[str, Any]],
    *,
    is_single: bool,
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> GrammarSpec:
    """A grammar of one call or several, in the family's form.

    Args:
        schemas: of each call, with the members ``name`` and ``arguments``.

    Raises:
        ApiError: 400 where the functions' schemas are too large together.
    """
    lines = ["start: calls", *_call_rules(written, schemas, is_single=is_single)]
    return _checked("\n".join(lines), written, limits)


def calls_or_answer(
    written: CallFormat,
    schemas: Sequence[dict[str, Any]],
    answer: GrammarSpec,
    *,
    is_single: bool,
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> GrammarSpec:
    """A grammar of calls in the family's form, or of a typed answer.

    Args:
        schemas: as of ``forced_calls``.
        answer: a JSON schema, or any JSON object.

    Raises:
        ApiError: 400 where the schemas are too large together.
    """
    schema = json.loads(answer.text) if answer.kind == "json_schema" else {"type": "object"}
    rules = _call_rules(written, schemas, is_single=is_single)
    lines = ["start: calls | answer", *rules, f"answer: %json {inline_schema(schema)}"]
    return _checked("\n".join(lines), written, limits)


def _checked(text: str, written: CallFormat, limits: LimitsConfig) -> GrammarSpec:
    if len(text) > 2 * limits.max_schema_chars:
        raise exceeded(limits, "max_schema_chars", "tools", value=len(text))
    end, ids = _form(written).end_of_text, written.token_ids
    parts = [ids.get(part, part) for part in written.parts(end) if part] if end else []
    return GrammarSpec(kind="lark", text=text, has_calls=True, ends=(tuple(parts),) if end else ())


def _call_rules(
    written: CallFormat, schemas: Sequence[dict[str, Any]], *, is_single: bool
) -> list[str]:
    """The rules of ``calls``."""
    form = _form(written)
    calls = "call" if is_single else f"call ({form.separator} call){{0,{MAX_FORCED_CALLS - 1}}}"
    if form.kind == "object" and form.end.startswith("]"):
        begin = f'{written.literal(form.begin)} / ?/ "["'
    else:
        begin = written.literal(form.begin) if form.begin else ""
    end = written.literal(form.end) if form.end else ""
    rules = [f"calls: {begin} {calls} {end}".rstrip()]
    if form.kind == "object":
        return rules + _object_rules(written, form, schemas)
    names = " | ".join(f"call_{index}" for index in range(len(schemas)))
    rules.append(f"call: {names}")
    for index, schema in enumerate(schemas):
        properties = schema["properties"]
        name, arguments = properties["name"]["const"], properties["arguments"]
        rules += _named_rules(written, form, f"{index}", name, arguments)
    return rules


def _object_rules(written: CallFormat, form: _Form, schemas: Iterable[dict[str, Any]]) -> list[str]:
    call = f"%json {inline_schema(_any_call(schemas, form.arguments_key))}"
    if not form.before:
        return [f"call: {call}"]
    before, after = written.literal(form.before), written.literal(form.after)
    return [f"call: {before} {_BLANK} object {_BLANK} {after}", f"object: {call}"]


def _named_rules(
    written: CallFormat, form: _Form, rule: str, name: str, arguments: dict[str, Any]
) -> list[str]:
    """The rules of the calls of one function."""
    if form.kind == "python":
        rules = keyword_rules(f"call_{rule}", name, arguments, inline_schema)
        return rules or [
            f'call_{rule}: "{name}(**" args_{rule} ")"',
            f"args_{rule}: %json {inline_schema(arguments)}",
        ]
    before = written.literal(form.before + name) if form.before else f'"{name}"'
    after = written.literal(form.after) if form.after else ""
    if form.kind == "escaped":
        rules = escaped_rules(f"args_{rule}", arguments, inline_schema, written)
        rules = rules or [f"args_{rule}: %json {inline_schema(arguments)}"]
        return [f"call_{rule}: {before} args_{rule} {after}", *rules]
    if form.kind == "parameters":
        rules = parameter_rules(f"params_{rule}", arguments, inline_schema, written, form.parameter)
        function, end = form.function
        begin = written.literal(form.before + function.format(name))
        if rules:
            return [
                f"call_{rule}: {begin} params_{rule} {written.literal(end + form.after)}",
                *rules,
            ]
        closing = written.literal(f"\n{end}{form.after}")
        return [
            f"call_{rule}: {begin} args_{rule} {closing}",
            f"args_{rule}: %json {inline_schema(arguments)}",
        ]
    between = written.literal(form.between)
    if written.family == "kimi_k2":
        between = f'":" /[0-9]{{1,2}}/ {between}'
    return [
        f"call_{rule}: {before} {between} args_{rule} {after}".rstrip(),
        f"args_{rule}: %json {inline_schema(arguments)}",
    ]


def inline_schema(schema: Any) -> str:
    """A schema for a ``%json`` rule, with as little white space as a schema alone has."""
    return json.dumps({**schema, "x-guidance": {**JSON_WHITESPACE}})


def _any_call(schemas: Iterable[dict[str, Any]], arguments_key: str) -> dict[str, Any]:
    """A call of one of the functions, as a schema."""
    variants = []
    for index, schema in enumerate(schemas):
        place = f"#/anyOf/{index}/properties/{arguments_key}"
        properties = schema["properties"]
        arguments = _at(properties["arguments"], place)
        variants.append(
            {
                **schema,
                "properties": {"name": properties["name"], arguments_key: arguments},
                "required": ["name", arguments_key],
            }
        )
    return {"anyOf": variants}


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
