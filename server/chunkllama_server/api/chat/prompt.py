"""A conversation checked, written as the template wants it, and tokenized, with its cache
breakpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkllama.errors import InvalidRequestError
from chunkllama_server.api.common.prompt_cache import common_prefix
from chunkllama_server.api.common.text_service import ChatTemplate, Message, TextService, text_size
from chunkllama_server.api.schema.chat import ChatCompletionRequest, ChatMessage, ContentPart
from chunkllama_server.api.tools.prompt import describe_tools, write_calls
from chunkllama_server.config.api_settings import ApiSettings
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError, invalid

# Stands behind a breakpoint in a second rendering of the same conversation: a character no prompt
# has, so that the two tokenizations part exactly where the reusable prefix ends.
_MARKER = "\ue0ff\u0001"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Token ids of a rendered conversation.

    Attributes:
        breakpoint: tokens before the last explicit cache breakpoint; None without one.
        continued_text: content of the final message, when the answer goes on from there.
    """

    token_ids: list[int]
    breakpoint: int | None = None
    continued_text: str = ""


def _part_text(part: ContentPart, path: str) -> str:
    if part.type not in ("text", "refusal"):
        raise invalid(f"Content of type {part.type!r} is not supported; send text", path)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise invalid(f"A {part.type} part needs {part.type!r}", f"{path}.{part.type}")
    return text


def _content_text(message: ChatMessage, path: str) -> str | None:
    if isinstance(message.content, list):
        return "\n".join(
            _part_text(part, f"{path}.content[{index}]")
            for index, part in enumerate(message.content)
        )
    return message.content if message.content is not None else message.refusal


def parse_arguments(arguments: str, path: str) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        ApiError: 400 for what is not the JSON text of an object.
    """
    try:
        parsed = parse_json((arguments or "{}").encode())
    except ApiError:
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid("arguments must be the JSON text of an object", path)
    return parsed


def _template_calls(message: ChatMessage, path: str) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for index, call in enumerate(message.tool_calls or ()):
        where = f"{path}.tool_calls[{index}].function.arguments"
        arguments = parse_arguments(call.function.arguments, where)
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    if message.function_call is not None:
        where = f"{path}.function_call.arguments"
        arguments = parse_arguments(message.function_call.arguments, where)
        function = {"name": message.function_call.name, "arguments": arguments}
        calls.append({"id": "call_0", "type": "function", "function": function})
    return calls


def template_messages(messages: list[ChatMessage], *, keeps_developer: bool) -> list[Message]:
    """Messages as templates expect them: text content, parsed call arguments, known roles.

    Raises:
        ApiError: 400 naming the message's field.
    """
    result: list[Message] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role: str = message.role
        if role == "developer" and not keeps_developer:
            role = "system"
        calls = _template_calls(message, path) if role == "assistant" else []
        content = _content_text(message, path)
        if content is None and not calls:
            raise invalid("A message needs content", f"{path}.content")
        if role == "tool" and message.tool_call_id is None:
            raise invalid("A tool message needs tool_call_id", f"{path}.tool_call_id")
        if role == "function":
            role = "tool"
        entry: Message = {"role": role, "content": content or ""}
        if calls:
            entry["tool_calls"] = calls
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                entry[name] = value
        result.append(entry)
    return result


def last_breakpoint(messages: list[ChatMessage]) -> tuple[int, int] | None:
    """Message and part index of the last explicit breakpoint."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].content
        if isinstance(content, list):
            for j in range(len(content) - 1, -1, -1):
                if content[j].prompt_cache_breakpoint is not None:
                    return i, j
    return None


def template_kwargs(body: ChatCompletionRequest, settings: ApiSettings) -> dict[str, Any]:
    """Extra template variables a request may set.

    Raises:
        ApiError: 400 for a name that is not on the operator's list.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    for name, value in kwargs.items():
        if name not in settings.chat_template_kwargs or not isinstance(value, str | bool | int):
            raise invalid(
                f"chat_template_kwargs.{name[:64]} is not allowed here; allowed: "
                f"{', '.join(settings.chat_template_kwargs)}",
                "chat_template_kwargs",
            )
    if body.reasoning_effort is not None:
        kwargs["reasoning_effort"] = body.reasoning_effort
    return kwargs


class ChatPrompter:
    """Renders and tokenizes the conversation of one request.

    Raises (on construction and in its methods):
        ApiError: 400 naming the field.
    """

    def __init__(
        self,
        body: ChatCompletionRequest,
        settings: ApiSettings,
        text: TextService,
        tools: list[dict[str, Any]] | None,
    ) -> None:
        if body.chat_template is not None and not settings.trust_request_chat_template:
            raise invalid("chat_template is not accepted by this server", "chat_template")
        if body.add_special_tokens:
            raise invalid("The chat template writes special tokens itself", "add_special_tokens")
        continues = bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            raise invalid(
                "continue_final_message excludes add_generation_prompt", "continue_final_message"
            )
        self._template: ChatTemplate = text.chat_template(body.chat_template)
        self._body = body
        self._text = text
        accepts = self._template.accepts
        self._messages = template_messages(body.messages, keeps_developer=accepts("developer"))
        if not accepts("tool_calls"):
            self._messages = write_calls(self._messages)
        # Positions of the client's messages in what the template gets.
        self._num_added = 0
        if tools and not accepts("tools"):
            described = describe_tools(self._messages, tools)
            self._num_added = len(described) - len(self._messages)
            self._messages, tools = described, None
        self._options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": not continues and body.add_generation_prompt is not False,
            "continue_final_message": continues,
            "template_kwargs": template_kwargs(body, settings),
        }
        self._size = text_size([self._messages, self._options])

    async def encode(self) -> ChatPrompt:
        """Token ids, and where the last cache breakpoint lies in them."""
        return await self._text.run(self._size, self._encode)

    async def render(self) -> str:
        """The prompt's text."""
        return await self._text.run(
            self._size,
            lambda: self._template.render(self._messages, **self._options),
        )

    def _encode(self) -> ChatPrompt:
        try:
            ids = self._template.encode(self._messages, **self._options)
            limit = self._body.truncate_prompt_tokens
            if limit is not None:
                ids = ids[-limit:]
            position = last_breakpoint(self._body.messages)
            reusable = None
            if position is not None and limit is None:
                reusable = self._tokens_before(ids, *position)
        except InvalidRequestError as error:
            raise invalid(error.message, error.param or "messages", error.code) from None
        continued = self._messages[-1]["content"] if self._body.continue_final_message else ""
        return ChatPrompt(ids, reusable, continued)

    def _tokens_before(self, ids: list[int], message: int, part: int) -> int:
        """Tokens of ``ids`` that do not depend on what follows the breakpoint."""
        content = self._body.messages[message].content
        assert isinstance(content, list)
        kept = "\n".join(
            _part_text(item, f"messages[{message}].content") for item in content[: part + 1]
        )
        place = message + self._num_added
        marked = [*self._messages]
        text = kept + _MARKER + marked[place]["content"].removeprefix(kept)
        marked[place] = {**marked[place], "content": text}
        return common_prefix(ids, self._template.encode(marked, **self._options))
