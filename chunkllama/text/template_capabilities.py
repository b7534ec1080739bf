"""Determine what a chat template can express by rendering probe conversations.

Each probe holds sentinel strings; what the template can express is read from its output, never from
its source: a comment may contain any word.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from chunkllama.text.thoughts import KNOWN_TAGS

Message = dict[str, Any]


class Render(Protocol):
    """Renders messages with tools and template arguments; None where the template refuses them."""

    def __call__(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        arguments: dict[str, Any] | None = None,
    ) -> str | None: ...


CALL_MARKERS = (
    *("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function=", "<parameter=", "functools["),
    *("<|tool_call|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", ">>>", "<|recipient|>"),
    *("<function_calls>", "<|python_start|>", "<|tool_call_start|>"),
    *("<|tool_calls_section_begin|>", "[ARGS]", "<seed:tool_call>", "<arg_key>"),
    *("<minimax:tool_call>", "<｜DSML｜function_calls>", "<start_function_call>"),
)
LONG_ID = "call_0123456789abcdef01234567"
SHORT_ID = "a1B2c3D4e"
# Kimi K2 prints a call's id instead of its name.
NAMED_ID = "functions.{name}:{number}"
_IDS = {"any": LONG_ID, "short": SHORT_ID, "named": NAMED_ID}
_NAME, _KEY = "qztoola", "qzkeya"


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """What a template's output shows.

    Attributes:
        content: whether text is given as a string or as a list of parts.
        system: it prints a first system message, also where a call's result is the last one.
        system_anywhere: it prints system messages at any place, several of them too.
        system_optional: a conversation needs no system message.
        first_answer: a conversation may begin with an answer, or have no user's turn.
        developer: it has a form of its own for the role developer.
        repeated_roles: it prints two user or two assistant messages in a row.
        empty_text: an answer may be empty.
        tools: it prints the tools, also where a call's result is the last message.
        bare_tools: parameters of tools need neither type nor description.
        tool_calls: it prints earlier calls: their names and arguments.
        arguments: whether a call's arguments are given as an object or as JSON text.
        parallel_calls: it prints several calls of one message.
        text_beside_calls: it prints the text of a message that has calls.
        tool_results: it prints messages of role tool.
        lone_results: it prints results without a call before them and without a function's name.
        call_ids: "any"; "short" where it refuses others than nine letters and digits; "named" where
            it prints a call's name only as part of its id.
        call_markers: known tags around calls that its output has.
        python_calls: it prints a call as Python.
        thought_tags: the tags around thoughts, of its output or of the vocabulary.
        opens_thinking: its generation prompt ends with the first of them.
        thinking_switch: the argument that turns thoughts on and off.
        reasoning_effort: it prints something else for another ``reasoning_effort``.
        keeps_thoughts: it prints the thoughts of an earlier turn.
    """

    content: Literal["text", "parts"] = "text"
    system: bool = True
    system_anywhere: bool = True
    system_optional: bool = True
    first_answer: bool = True
    developer: bool = False
    repeated_roles: bool = True
    empty_text: bool = True
    tools: bool = True
    bare_tools: bool = True
    tool_calls: bool = True
    arguments: Literal["object", "text"] = "object"
    parallel_calls: bool = True
    text_beside_calls: bool = True
    tool_results: bool = True
    lone_results: bool = True
    call_ids: Literal["any", "short", "named"] = "any"
    call_markers: tuple[str, ...] = ()
    python_calls: bool = False
    thought_tags: tuple[str, str] | None = None
    opens_thinking: bool = False
    thinking_switch: str | None = None
    reasoning_effort: bool = False
    keeps_thoughts: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        plain = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def describe(self) -> str:
        """One line: the tags and forms, what the template can express, and what it cannot."""
        plain = {key.replace("_", " "): value for key, value in self.as_dict().items()}
        forms = {k: v for k, v in plain.items() if v and not isinstance(v, bool)}
        parts = [f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in forms.items()]
        for title, shown in (("can", True), ("cannot", False)):
            if names := [key for key, value in plain.items() if value is shown]:
                parts.append(f"{title}: {', '.join(names)}")
        return "; ".join(parts)


def tool(name: str) -> dict[str, Any]:
    """A tool of one string parameter."""
    properties = {_KEY: {"type": "string", "description": "qzparameter"}}
    parameters = {"type": "object", "properties": properties, "required": [_KEY]}
    function = {"name": name, "description": "qzdescription", "parameters": parameters}
    return {"type": "function", "function": function}


_BARE_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {}}},
    },
}


def probe(render: Render, vocabulary: Container[str] = ()) -> TemplateCapabilities:
    """Render the probes; a template that refuses even a greeting is taken to express everything.

    Args:
        vocabulary: the added tokens, which may have the tags of thoughts.
    """
    for given in (render, _behind_a_system_message(render)):
        for content in ("text", "parts"):
            probes = _Probes(given, content, vocabulary)
            if probes.prints([probes.message("user", "qzhello")], "qzhello"):
                return replace(probes.run(), system_optional=given is render)
    return TemplateCapabilities()


def _behind_a_system_message(render: Render) -> Render:
    """Render conversations behind an empty system message, for a template that requires one."""

    def rendered(
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        arguments: dict[str, Any] | None = None,
    ) -> str | None:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        return render(messages, tools, arguments)

    return rendered


class _Probes:
    def __init__(self, render: Render, content: str, vocabulary: Container[str]) -> None:
        self._render = render
        self._vocabulary = vocabulary
        self._content: Literal["text", "parts"] = "parts" if content == "parts" else "text"

    def message(self, role: str, text: str, **members: Any) -> Message:
        content = text if self._content == "text" else [{"type": "text", "text": text}]
        return {"role": role, "content": content, **members}

    def prints(
        self, messages: list[Message], *sentinels: str, tools: list[dict[str, Any]] | None = None
    ) -> bool:
        """Whether the output has the sentinels, in this order."""
        text, start = self._render(messages, tools), 0
        for sentinel in sentinels:
            start = -1 if text is None else text.find(sentinel, start)
            if start < 0:
                return False
        return text is not None

    def run(self) -> TemplateCapabilities:
        m = self.message
        user, answer, again = m("user", "qzone"), m("assistant", "qztwo"), m("user", "qzthree")
        first, later = m("system", "qzsys"), m("system", "qzlater")
        # Where roles must alternate, users and assistants are refused alike.
        repeated = [user, again, answer, m("assistant", "qzfour"), again]
        middle = [first, user, answer, later, again]
        prompt = self._render([user], None) or ""
        with_tools = self._render([user], [tool(_NAME)]) or ""
        calls = self._calls(with_tools)
        system = self.prints([first, user], "qzsys", "qzone")
        if system and calls["tool_calls"]:  # some leave it out where no user's turn is the last
            ident = _IDS[calls["call_ids"]]
            made = self._conversation(1, ident, calls["arguments"] == "text")
            system = self.prints([first, *made], "qzsys", tools=[tool(_NAME)])
        return TemplateCapabilities(
            content=self._content,
            system=system,
            system_anywhere=self.prints(middle, "qzsys", "qztwo", "qzlater", "qzthree")
            and self.prints([first, later, user], "qzsys", "qzlater", "qzone"),
            first_answer=self._begins_with_an_answer(first, answer, again),
            developer=self._knows_developer(user),
            repeated_roles=self.prints(repeated, "qzone", "qzthree", "qztwo", "qzfour", "qzthree"),
            empty_text=self._accepts_an_empty_answer(user, answer, again),
            tools=_NAME in with_tools and self._shows_tools_later(calls),
            bare_tools=not with_tools or self._render([user], [_BARE_TOOL]) is not None,
            **self._thoughts(user, again, prompt),
            **calls,
        )

    def _accepts_an_empty_answer(self, user: Message, answer: Message, again: Message) -> bool:
        empty = {**answer, "content": "" if self._content == "text" else []}
        refuses = self._render([user, empty, again], None) is None
        return not refuses or self._render([user, answer, again], None) is None

    def _shows_tools_later(self, calls: dict[str, Any]) -> bool:
        """Whether the tools are printed where the last message is a call's result."""
        if not (calls["tool_calls"] and calls["tool_results"]):
            return True
        ident = _IDS[calls["call_ids"]]
        made = self._conversation(1, ident, calls["arguments"] == "text")
        return self.prints(made, "qzunused", tools=[tool(_NAME), tool("qzunused")])

    def _begins_with_an_answer(self, system: Message, answer: Message, user: Message) -> bool:
        """Whether a conversation may begin with an answer, and need not have a user's turn."""
        tools = [tool(_NAME)]
        return (
            self.prints([answer, user], "qztwo", "qzthree")
            and (
                not self.prints([system, user], "qzsys")
                or (
                    self.prints([system, answer, user], "qzsys", "qztwo", "qzthree")
                    and self.prints([system], "qzsys")
                )
            )
            and all(
                self._render([first, user], tools) is None
                or self._render([first], tools) is not None
                for first in (answer, system)
            )
        )

    def _thoughts(self, user: Message, again: Message, prompt: str) -> dict[str, Any]:
        """The members of the record that are about thoughts."""
        names = ("reasoning_content", "thinking", "reasoning")
        thought = self.message("assistant", "qztwo", **dict.fromkeys(names, "qzthought"))
        last = self._render([user, thought], None) or ""
        switches = ("enable_thinking", "thinking")
        prompts = {
            name: [self._render([user], None, {name: value}) or "" for value in (False, True)]
            for name in switches
        }
        switch = next((name for name in switches if prompts[name][0] != prompts[name][1]), None)
        shown = "".join((prompt, last, *(text for pair in prompts.values() for text in pair)))
        tags = next((tags for tags in KNOWN_TAGS if tags.start in shown), None)
        if tags is None:
            known = (t for t in KNOWN_TAGS if t.start in self._vocabulary)
            tags = next((t for t in known if t.end in self._vocabulary), None)
        efforts = [
            self._render([user], None, {"reasoning_effort": effort}) for effort in ("low", "high")
        ]
        return {
            "thought_tags": None if tags is None else tuple(tags),
            "opens_thinking": tags is not None and prompt.rstrip().endswith(tags.start),
            "thinking_switch": switch,
            "reasoning_effort": efforts[0] != efforts[1],
            "keeps_thoughts": self.prints([user, thought, again], "qzthought", "qztwo"),
        }

    def _knows_developer(self, user: Message) -> bool:
        """A template that prints any role's name has no form of its own for this one."""
        text = self._render([self.message("developer", "qzdev"), user], None)
        other = self._render([self.message("qzrole", "qzdev"), user], None)
        if text is None or "qzdev" not in text:
            return False
        return other is None or other.replace("qzrole", "developer") != text

    def _conversation(
        self, count: int, call_id: str, as_text: bool, text: str = ""
    ) -> list[Message]:
        calls, results = [], []
        for i in range(count):
            arguments: Any = {_KEY: f"qzvalue{i}"}
            name = f"qzname{'ab'[i]}"
            function = {
                "name": name,
                "arguments": json.dumps(arguments) if as_text else arguments,
            }
            ident = call_id[:-1] + str(i)
            if call_id == NAMED_ID:
                ident = NAMED_ID.format(name=name, number=i)
            calls.append({"id": ident, "type": "function", "function": function})
            result = self.message("tool", f"qzresult{i}", tool_call_id=ident, name=function["name"])
            results.append(result)
        assistant = self.message("assistant", text, tool_calls=calls)
        return [self.message("user", "qzone"), assistant, *results]

    def _calls(self, with_tools: str) -> dict[str, Any]:
        """The members of the record that are about calls and their results."""
        tools = [tool(_NAME), tool("qztoolb")]
        found: dict[str, Any] = {"tool_calls": False, "parallel_calls": False}
        rendered = {
            (call_id, as_text): self._render(self._conversation(1, call_id, as_text), tools) or ""
            for call_id in _IDS.values()
            for as_text in (False, True)
        }
        shows = {key: "qznamea" in t and "qzvalue0" in t for key, t in rendered.items()}
        accepts_any = any(rendered[LONG_ID, t] for t in (False, True)) or not any(rendered.values())
        shown = {ident for ident, as_text in shows if shows[ident, as_text]}
        found["call_ids"] = "any" if accepts_any else "short"
        if shown == {NAMED_ID}:
            found["call_ids"] = "named"
        call_id = _IDS[found["call_ids"]]
        # An object printed as Python prints it is no JSON: such a template expects text.
        is_repr = f"'{_KEY}'" in rendered[call_id, False]
        as_text = shows[call_id, True] and (is_repr or not shows[call_id, False])
        found["arguments"] = "text" if as_text else "object"
        text = rendered[call_id, as_text]
        found["tool_calls"] = shows[call_id, as_text]
        found["tool_results"] = self._shows_results(text)
        found["lone_results"] = found["tool_results"] and self._shows_lone_results(call_id)
        two = self._conversation(2, call_id, as_text)
        names = ("qznamea", "qznameb")
        found["parallel_calls"] = found["tool_calls"] and self.prints(two, *names, tools=tools)
        beside = self._conversation(1, call_id, as_text, text="qzbeside")
        found["text_beside_calls"] = self.prints(beside, "qzbeside", tools=tools)
        found["python_calls"] = f"qznamea({_KEY}=" in text
        found["call_markers"] = tuple(tag for tag in CALL_MARKERS if tag in with_tools + text)
        return found

    def _shows_results(self, text: str) -> bool:
        return "qzresult0" in text or self._shows_lone_results(SHORT_ID, name=_NAME)

    def _shows_lone_results(self, call_id: str, **members: str) -> bool:
        result = self.message("tool", "qzresult0", tool_call_id=call_id, **members)
        told = [self.message("user", "qzone"), self.message("assistant", "qztwo"), result]
        return self.prints(told, "qztwo", "qzresult0")
