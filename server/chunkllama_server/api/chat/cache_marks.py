"""Where a prefix to keep ends in the tokens of a prompt.

A conversation is rendered a second time, changed right behind the mark: the tokens that both
renderings begin with do not depend on what follows. So the position is exact for every template,
wherever it writes tools and system prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkllama.text.template_adapter import template_tool
from chunkllama_server.api.chat.history import normalise
from chunkllama_server.api.common.text_service import Message
from chunkllama_server.api.schema.chat import (
    CacheMark,
    CalledFunction,
    ChatMessage,
    MessageToolCall,
)

# A character that no prompt has, so that the tokens differ exactly from here on.
MARKER = "\ue0ff\u0001"
Tools = list[dict[str, Any]] | None


def changed_behind(
    mark: CacheMark, messages: Sequence[ChatMessage], tools: Tools
) -> tuple[list[Message], Tools]:
    """The conversation with another continuation behind the mark.

    A mark that includes tools ends behind those that the template writes after it, so the message
    that follows is changed, and not the marked one.

    Raises:
        ApiError: as ``normalise``.
    """
    if mark.tool is not None:
        kept = (tools or [])[: mark.tool + 1]
        return normalise(list(messages)).messages, [*kept, template_tool({"name": MARKER})]
    changed = list(messages)
    message = changed[mark.message]
    if mark.call is not None:
        calls = [*(message.tool_calls or ())[: mark.call + 1], _marker_call()]
        changed[mark.message] = _with(message, tool_calls=calls)
    elif mark.includes_tools and mark.message + 1 < len(changed):
        following = changed[mark.message + 1]
        changed[mark.message + 1] = _with(following, content=MARKER + _text(following))
    else:
        changed[mark.message] = _with_marked_part(message, mark.part)
    return normalise(changed).messages, tools


def _text(message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, list):
        return "\n".join(part.text or "" for part in content)
    return content or ""


def _with_marked_part(message: ChatMessage, part: int | None) -> ChatMessage:
    content = message.content
    if part is None or not isinstance(content, list):
        return _with(message, content=f"{content or ''}{MARKER}")
    text = (content[part].text or "") + MARKER
    marked = content[part].model_copy(update={"text": text})
    return _with(message, content=[*content[:part], marked, *content[part + 1 :]])


def _with(message: ChatMessage, **changes: Any) -> ChatMessage:
    return message.model_copy(update=changes)


def _marker_call() -> MessageToolCall:
    return MessageToolCall(id="call", function=CalledFunction(name=MARKER, arguments={}))
