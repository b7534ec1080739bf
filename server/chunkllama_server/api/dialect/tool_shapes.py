"""Shapes of tools and tool choices of other APIs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chunkllama_server.api.dialect.shaped import DialectError, Shaped

_FUNCTION_MEMBERS = ("name", "description", "parameters", "strict")
_OWN_TYPES = (None, "function", "custom")  # of tools that the client runs


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
    held = tool.get("tools")
    if tool.get("type") == "namespace" and isinstance(held, list):
        flat = [_flat_tool(each)[0] if isinstance(each, dict) else each for each in held]
        return {**tool, "tools": flat}, {}
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
    """A tool choice of the Responses API, Mistral ("any") or Anthropic as one of chat; another text
    is the name of a function."""
    plain = _plain_choice(value)
    if plain is None and isinstance(value, str):
        named = {"type": "function", "function": {"name": value}}
        return Shaped(named if value else None, {".function.name": ""})
    if plain is not None or not isinstance(value, dict):
        return Shaped(value if plain is None else plain)
    kind = value.get("type")
    if kind in ("function", "tool") and "name" in value and "function" not in value:
        choice = {"type": "function", "function": {"name": value["name"]}}
        return Shaped(choice, {".function.name": ".name"})
    if kind is None and isinstance(value.get("function"), dict):
        return Shaped({**value, "type": "function"})
    if kind == "allowed_tools":
        return _allowed(value, nests=True)
    return Shaped(value)


def response_tool_choice(value: Any) -> Shaped:
    """A tool choice of chat, Mistral or Anthropic as one of the Responses API."""
    plain = _plain_choice(value)
    if plain is None and isinstance(value, str):
        return Shaped({"type": "function", "name": value} if value else None, {".name": ""})
    if plain is not None or not isinstance(value, dict):
        return Shaped(value if plain is None else plain)
    inner = value.get("function")
    if value.get("type") in (None, "function") and isinstance(inner, dict):
        return Shaped({"type": "function", "name": inner.get("name")}, {".name": ".function.name"})
    if value.get("type") == "tool":
        return Shaped({**value, "type": "function"})
    if value.get("type") == "allowed_tools":
        return _allowed(value, nests=False)
    return Shaped(value)


def _allowed(value: dict[str, Any], *, nests: bool) -> Shaped:
    """A subset of the tools, in the shape of chat or flat; tools that servers run are left out.

    Raises:
        DialectError: a call is required, and none is of a function.
    """
    inner = value.get("allowed_tools")
    held, below = (inner, ".allowed_tools") if isinstance(inner, dict) else (value, "")
    given = held.get("tools")
    if not isinstance(given, list):
        return Shaped(value)
    tools: list[Any] = []
    ignored = []
    for index, tool in enumerate(given):
        named = _name_of(tool)
        if named is None and isinstance(tool, dict) and tool.get("type") not in _OWN_TYPES:
            ignored.append(f"{below}.tools[{index}]")
        elif named is None:
            tools.append(tool)
        else:
            function = {"name": named}
            space = {} if tool.get("namespace") is None else {"namespace": tool["namespace"]}
            members = {"function": function} if nests else {**function, **space}
            tools.append({"type": "function", **members})
    mode = held.get("mode", "auto")
    if ignored and not tools:
        if mode == "required":
            raise DialectError("has no function", f"{below}.tools".removeprefix("."))
        return Shaped("none", ignored=tuple(ignored))
    allowed = {"mode": mode, "tools": tools}
    if not nests:
        renamed = {f".{name}": f"{below}.{name}" for name in allowed}
        return Shaped({"type": "allowed_tools", **allowed}, renamed, ignored=tuple(ignored))
    renamed = {f".allowed_tools.{name}": f"{below}.{name}" for name in allowed}
    shaped = {"type": "allowed_tools", "allowed_tools": allowed}
    return Shaped(shaped, renamed, ignored=tuple(ignored))


def _name_of(tool: Any) -> str | None:
    """The name of an allowed function or custom tool; None for another tool."""
    if not isinstance(tool, dict) or tool.get("type") not in _OWN_TYPES:
        return None
    holders = [tool, *(tool.get(name) for name in ("function", "custom"))]
    names = [holder.get("name") for holder in holders if isinstance(holder, dict)]
    return next((name for name in names if isinstance(name, str)), None)


_WORDS = {"any": "required", "auto": "auto", "none": "none", "required": "required"}


def _plain_choice(value: Any) -> str | None:
    """A choice that is one word, whether written as a word or as an object of a type; None for
    another, of which a text is the name of a function."""
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, dict) and set(value) == {"type"}:
        return _WORDS.get(str(value["type"]))
    return None
