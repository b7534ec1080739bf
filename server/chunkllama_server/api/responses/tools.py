"""The tools of a Responses request as functions of a chat completion, and what their calls become.

A namespace is a group of functions that the client runs, such as those of an MCP server. The model
knows each by the name of its namespace and its own, and a call of it names both apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from chunkllama_server.api.schema.chat import (
    AllowedTools,
    ChatTool,
    FunctionDefinition,
    InputFormat,
    NamedFunction,
    NamedToolChoice,
)
from chunkllama_server.api.schema.responses import (
    InputItem,
    ResponseRequest,
    ResponseTool,
    ResponseToolChoice,
)
from chunkllama_server.api.tools.raw_input import CUSTOM_INPUT
from chunkllama_server.transport.errors import invalid, spelled_path

ADDITIONAL_TOOLS = "additional_tools"  # an item that offers tools beside those of the request
_JOINT = "__"
_MAX_TOOLS = 1024  # with those of namespaces


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A function or custom tool that the model may call.

    Attributes:
        path: of the tool in the request.
        name: by which the model knows it.
        namespace: that it stands in; None for one of the request itself.
        about: what the request says of the namespace, for the first tool in it.
    """

    path: str
    name: str
    tool: ResponseTool
    namespace: str | None = None
    about: str | None = None

    @property
    def is_custom(self) -> bool:
        """Whether its input is free text."""
        return self.tool.type == "custom"


def function_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool."""
    if not namespace or not name:
        return name
    return f"{namespace}{'' if namespace.endswith(_JOINT) else _JOINT}{name}"


def offered_tools(body: ResponseRequest) -> list[OfferedTool]:
    """The functions and custom tools of a request, those of its namespaces and items too.

    Raises:
        ApiError: 400 for a tool or namespace without a name, or too many tools.
    """
    found = list(_each(body.tools or (), "tools"))
    for index, item in enumerate(body.input if isinstance(body.input, list) else ()):
        if item.type == ADDITIONAL_TOOLS:
            found += _each(_read_tools(item), f"input[{index}].tools")
    if len(found) > _MAX_TOOLS:
        raise invalid(f"At most {_MAX_TOOLS} tools are served, got {len(found)}", "tools")
    return found


def _each(tools: Sequence[ResponseTool | None], path: str) -> Iterator[OfferedTool]:
    for index, tool in enumerate(tools):
        if tool is None or tool.is_skipped():
            continue
        where = f"{path}[{index}]"
        if tool.name is None:
            raise invalid("A function needs a name", f"{where}.name")
        if tool.type != "namespace":
            yield OfferedTool(where, tool.name, tool)
            continue
        about = tool.description
        for each in _each(tool.tools or (), f"{where}.tools"):
            if each.namespace is not None:
                raise invalid("A namespace holds no other namespace", f"{each.path}.type")
            name = function_name(tool.name, each.name)
            yield OfferedTool(each.path, name, each.tool, tool.name, about)
            about = None


def _read_tools(item: InputItem) -> list[ResponseTool | None]:
    """The tools of an item; None for what is none, because items are data."""
    read: list[ResponseTool | None] = []
    for given in item.tools if isinstance(item.tools, list) else ():
        try:
            read.append(ResponseTool.model_validate(given))
        except ValidationError:
            read.append(None)
    return read


def unread_tools(item: InputItem) -> bool:
    """Whether an item of additional tools has one that is left out."""
    return any(tool is None or tool.is_skipped() for tool in _read_tools(item))


def chat_tools(offered: Sequence[OfferedTool]) -> list[ChatTool]:
    """The tools of the chat completion.

    Raises:
        ApiError: 400 for a name that no function may have.
    """
    tools = []
    for each in offered:
        try:
            tools.append(ChatTool(type="function", function=_function(each)))
        except ValidationError:
            raise invalid(
                "A function's name has 1 to 128 letters, digits, _, - and ."
                + (", with that of its namespace" if each.namespace else ""),
                f"{each.path}.name",
            ) from None
    return tools


def tool_paths(body: ResponseRequest, spelled: Mapping[str, str]) -> dict[str, str]:
    """Paths of the chat completion's functions and their members, and of these in the request.

    Args:
        spelled: paths of the request, and as the client wrote them.
    """
    paths = {}
    for index, each in enumerate(offered_tools(body)):
        ours = f"tools[{index}].function"
        paths[ours] = each.path
        for member in ("name", "parameters"):
            paths[f"{ours}.{member}"] = spelled_path(spelled, f"{each.path}.{member}")
    return paths


def _function(offered: OfferedTool) -> FunctionDefinition:
    """A function, or a custom tool as a function of one text."""
    tool = offered.tool
    description = "\n\n".join(filter(None, (offered.about, tool.description)))
    if not offered.is_custom:
        return FunctionDefinition(
            name=offered.name,
            description=description or tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
    value = {"type": "string"}
    given = _input_format(tool.format or {})
    if given is not None:
        description += f"\nThe input matches this {given.syntax} grammar:\n{given.definition}"
        if given.syntax == "regex":
            value["pattern"] = f"^(?:{given.definition})$"
    function = FunctionDefinition(
        name=offered.name,
        description=description.strip() or None,
        parameters={
            "type": "object",
            "properties": {CUSTOM_INPUT: value},
            "required": [CUSTOM_INPUT],
            "additionalProperties": False,
        },
    )
    return function if given is None else function.with_input(given)


def _input_format(given: Mapping[str, Any]) -> InputFormat | None:
    """The grammar of a custom tool's input; free text, or what no server knows, has none."""
    syntax, definition = given.get("syntax"), given.get("definition")
    if syntax not in ("lark", "regex") or not isinstance(definition, str):
        return None
    return InputFormat(syntax, definition)


def chat_tool_choice(choice: ResponseToolChoice, tools: Sequence[OfferedTool]) -> NamedToolChoice:
    """The tool choice of the chat completion; a tool of a namespace may be named by its own name.

    Raises:
        ApiError: 400 for a choice without its name or tools.
    """
    names: dict[Any, str] = {each.tool.name: each.name for each in reversed(tools)}
    names |= {each.name: each.name for each in tools}
    if choice.type in ("function", "custom"):
        if choice.name is None:
            raise invalid("A function choice needs a name", "tool_choice.name")
        name = names.get(choice.name, choice.name)
        return NamedToolChoice(type="function", function=NamedFunction(name=name))
    if choice.tools is None:
        raise invalid("allowed_tools needs tools", "tool_choice.tools")
    given = (tool.get("name") for tool in choice.tools)
    read = (names.get(name, name) if isinstance(name, str) else name for name in given)
    found = [{"type": "function", "function": {"name": name}} for name in read]
    allowed = AllowedTools(mode=choice.mode or "auto", tools=found)
    return NamedToolChoice(type="allowed_tools", allowed_tools=allowed)
