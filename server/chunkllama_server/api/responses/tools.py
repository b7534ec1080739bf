"""The tools of a Responses request as functions of a chat completion, and what their calls become.

A namespace is a group of functions that the client runs, such as those of an MCP server. The model
knows each by the name of its namespace and its own, and a call of it names both apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from chunkllama_server.api.schema.responses import ResponseTool, ResponseToolChoice
from chunkllama_server.api.tools.raw_input import CUSTOM_INPUT
from chunkllama_server.transport.errors import ApiError, invalid, spelled_path

ADDITIONAL_TOOLS = "additional_tools"  # an item that offers tools beside those of the request
NAMESPACE = "namespace"
_JOINT = "__"
_MAX_TOOLS = 1024  # with those of namespaces, and those that are left out
_OF_SPACES = frozenset(("type", "name", "description"))  # members of a namespace that are read


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A function or custom tool that the model may call.

    Attributes:
        path: of the tool in the request.
        name: by which the model knows it.
        function: what the model sees of it; that of the first tool of a namespace has what the
            request says of the namespace.
        namespace: that it stands in; None for one of the request itself.
    """

    path: str
    name: str
    tool: ResponseTool
    function: FunctionDefinition
    namespace: str | None = None

    @property
    def is_custom(self) -> bool:
        """Whether its input is free text."""
        return self.tool.type == "custom"


def function_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool."""
    if not namespace or not name:
        return name
    return f"{namespace}{'' if namespace.endswith(_JOINT) else _JOINT}{name}"


class ToolReader:
    """Collects the tools that a request offers: its own, and those of its conversation's items.

    Items are data: a tool in one that cannot be offered is left out. Of several tools of items with
    one name the last is offered, and one of the request itself before any of them.

    Args:
        own: tools of the request.
        kept: of the conversation that it continues, as that left them in ``kept``.

    Attributes:
        kept: the items' tools, each as it was given, for what continues the conversation.

    Raises:
        ApiError: 400 for one of ``own`` without a name or with one that none may have, or too many.
    """

    def __init__(self, own: Sequence[ResponseTool], kept: Sequence[dict[str, Any]] = ()) -> None:
        self._room = _MAX_TOOLS
        self._of_items: dict[str, OfferedTool] = {}
        self._given: dict[str, dict[str, Any]] = {}
        self._take_room(sum(max(len(tool.tools or ()), 1) for tool in own), "tools")
        self._own = [
            each for i, tool in enumerate(own) for each in _offered_by(tool, f"tools[{i}]")
        ]
        for given in kept:
            self._offer(given, "previous_response_id")

    @property
    def kept(self) -> list[dict[str, Any]]:
        return [*self._given.values()]

    def add(self, given: Any, path: str) -> bool:
        """Add the tools of an item; returns False if some are left out.

        Raises:
            ApiError: 400 for too many.
        """
        if not isinstance(given, list):
            return given is None
        self._take_room(_num_tools(given), path)
        are_read = True
        for index, tool in enumerate(given):
            are_read &= self._add(tool, f"{path}[{index}]")
        return are_read

    def _add(self, given: Any, path: str) -> bool:
        nested = given.get("tools") if isinstance(given, dict) else None
        if not isinstance(nested, list) or not nested or given.get("type") != NAMESPACE:
            return self._offer(given, path)
        space = {name: given[name] for name in _OF_SPACES & given.keys()}
        are_read = True
        for index, tool in enumerate(nested):
            if self._offer({**space, "tools": [tool]}, f"{path}.tools[{index}]"):
                space.pop("description", None)  # the first tool has it
            else:
                are_read = False
        return are_read

    def _offer(self, given: Any, path: str) -> bool:
        """Read one tool, or a namespace of one."""
        try:
            found = [*_offered_by(ResponseTool.model_validate(given), path)]
        except (ValidationError, ApiError):
            return False
        for each in found:
            self._of_items[each.name] = replace(each, path=path)
            self._given[each.name] = given
        return bool(found)

    def offered(self) -> list[OfferedTool]:
        """The tools that the model may call, those of the request first.

        Raises:
            ApiError: 400 for too many.
        """
        own = {each.name for each in self._own}
        found = [*self._own, *(each for each in self._of_items.values() if each.name not in own)]
        if len(found) > _MAX_TOOLS:
            raise _too_many(len(found), "tools")
        return found

    def _take_room(self, count: int, path: str) -> None:
        """Count tools before they are read: also those that are left out take time."""
        self._room -= count
        if self._room < 0:
            raise _too_many(_MAX_TOOLS - self._room, path)


def _too_many(count: int, path: str) -> ApiError:
    return invalid(f"At most {_MAX_TOOLS} tools are served, got {count}", path)


def _num_tools(given: Any) -> int:
    """Count an item's tools, also those of namespaces in namespaces."""
    if not isinstance(given, list):
        return 0
    return sum(
        max(_num_tools(tool.get("tools")), 1) if isinstance(tool, dict) else 1 for tool in given
    )


def _offered_by(tool: ResponseTool, path: str) -> Iterator[OfferedTool]:
    """The functions of a tool: itself, or those in it.

    Raises:
        ApiError: 400 for one without a name, or with one that none may have.
    """
    if tool.is_skipped():
        return
    if tool.name is None:
        raise invalid("A function needs a name", f"{path}.name")
    if tool.type != NAMESPACE:
        yield _as_offered(tool, path)
        return
    about = tool.description
    for index, each in enumerate(tool.tools or ()):
        if each.is_skipped():
            continue
        where = f"{path}.tools[{index}]"
        if each.type == NAMESPACE:
            raise invalid("A namespace holds no other namespace", f"{where}.type")
        if each.name is None:
            raise invalid("A function needs a name", f"{where}.name")
        yield _as_offered(each, where, tool.name, about)
        about = None


def _as_offered(
    tool: ResponseTool, path: str, namespace: str | None = None, about: str | None = None
) -> OfferedTool:
    name = function_name(namespace, tool.name or "")
    try:
        function = _function(tool, name, about)
    except ValidationError:
        raise invalid(
            "A function's name has 1 to 128 letters, digits, _, - and ."
            + (", with that of its namespace" if namespace else ""),
            f"{path}.name",
        ) from None
    return OfferedTool(path, name, tool, function, namespace)


def chat_tools(offered: Sequence[OfferedTool]) -> list[ChatTool]:
    """The tools of the chat completion."""
    return [ChatTool(type="function", function=each.function) for each in offered]


def tool_paths(offered: Sequence[OfferedTool], spelled: Mapping[str, str]) -> dict[str, str]:
    """Paths of the chat completion's functions and their members, and of these in the request.

    Args:
        spelled: paths of the request, and as the client wrote them.
    """
    paths = {}
    for index, each in enumerate(offered):
        ours = f"tools[{index}].function"
        paths[ours] = each.path
        for member in ("name", "parameters"):
            paths[f"{ours}.{member}"] = spelled_path(spelled, f"{each.path}.{member}")
    return paths


def _function(tool: ResponseTool, name: str, about: str | None) -> FunctionDefinition:
    """A function, or a custom tool as a function of one text."""
    description = "\n\n".join(filter(None, (about, tool.description)))
    if tool.type != "custom":
        return FunctionDefinition(
            name=name,
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
        name=name,
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
        ApiError: 400 for a choice without its name or tools, or a name of several namespaces.
    """
    names = _Names(tools)
    if choice.type in ("function", "custom"):
        if choice.name is None:
            raise invalid("A function choice needs a name", "tool_choice.name")
        name = names.find(choice.name, choice.namespace, "tool_choice.name")
        return NamedToolChoice(type="function", function=NamedFunction(name=name))
    if choice.tools is None:
        raise invalid("allowed_tools needs tools", "tool_choice.tools")
    found = [
        {
            "type": "function",
            "function": {
                "name": names.find(tool.get("name"), tool.get("namespace"), "tool_choice.tools")
            },
        }
        for tool in choice.tools
    ]
    allowed = AllowedTools(mode=choice.mode or "auto", tools=found)
    return NamedToolChoice(type="allowed_tools", allowed_tools=allowed)


class _Names:
    """Finds the names by which the model knows tools that a choice names."""

    def __init__(self, tools: Sequence[OfferedTool]) -> None:
        self._whole = {each.name for each in tools}
        self._by_own: dict[Any, list[str]] = {}
        for each in tools:
            self._by_own.setdefault(each.tool.name, []).append(each.name)

    def find(self, name: Any, namespace: Any, path: str) -> Any:
        """The name of a tool; what no tool has stays as it is.

        Raises:
            ApiError: 400 for a name that tools of several namespaces have.
        """
        if not isinstance(name, str):
            return name
        if namespace is not None:
            if not isinstance(namespace, str):
                raise invalid(f"The namespace of {name[:100]!r} is a text", path)
            return function_name(namespace, name)
        found = self._by_own.get(name, [])
        if name in self._whole or not found:
            return name
        if len(found) > 1:
            raise invalid(
                f"Several namespaces have {name[:100]!r}; name one as namespace, or the tool as "
                f"{found[0]}",
                path,
            )
        return found[0]
