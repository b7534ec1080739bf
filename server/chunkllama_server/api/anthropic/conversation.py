"""Messages of Anthropic's API as those of a chat."""

from __future__ import annotations

from typing import Any, NamedTuple

from chunkllama_server.api.schema.anthropic import (
    MEDIA_BLOCKS,
    CacheControl,
    ContentBlock,
    MessageTurn,
)
from chunkllama_server.api.schema.chat import (
    CacheMark,
    CalledFunction,
    ChatMessage,
    ContentPart,
    MessageToolCall,
)
from chunkllama_server.transport.errors import invalid

_ERROR = "Error:"
_BILLING = "x-anthropic-billing-header:"


class Place(NamedTuple):
    """A content part, or a call, of a message of the chat."""

    message: int
    part: int | None = None
    call: int | None = None


class MessageReader:
    """Turns messages into those of a chat: results of tools become messages of their own.

    Attributes:
        messages: of the chat so far.
        repairs: paths of blocks that were left out or replaced.
        controls: paths and places of cache marks, in the conversation's order.
        last_place: where the last block that can be marked ends.
        continues: the answer continues the last message.
    """

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.repairs: list[str] = []
        self.controls: list[tuple[str, CacheControl, Place]] = []
        self.last_place: Place | None = None
        self.continues = False

    def mark(self, place: Place, seconds: float) -> CacheMark:
        """A mark of the chat; the end of the system prompt is the end of the tools too."""
        message = self.messages[place.message]
        parts = message.content if isinstance(message.content, list) else []
        is_end = message.role == "system" and place.part == len(parts) - 1
        return CacheMark(
            seconds=seconds,
            message=place.message,
            part=place.part,
            call=place.call,
            includes_tools=is_end and place.message == 0,
        )

    def read_system(self, system: str | list[ContentBlock] | None) -> None:
        """Add the system prompt, without the line of Claude Code about its billing."""
        if isinstance(system, str):
            text = _without_billing(system)
            if text != system:
                self.repairs.append("system")
            if text or not system:
                self._add("system", [ContentPart(type="text", text=text)], "system")
        elif system is not None:
            self._read_system_blocks(system, "system")

    def _read_system_blocks(self, blocks: list[ContentBlock], path: str) -> None:
        parts: list[ContentPart] = []
        for index, block in enumerate(blocks):
            where = f"{path}[{index}]"
            if block.type in MEDIA_BLOCKS:
                raise _refused(block, where)
            if block.type != "text" or block.text is None:
                self.repairs.append(where)
                continue
            text = _without_billing(block.text)
            if text != block.text:
                self.repairs.append(where)
                if not text:
                    continue
            parts.append(ContentPart(type="text", text=text))
            self._note(block, where, Place(len(self.messages), len(parts) - 1))
        if parts:
            self._add("system", parts, path)

    def read_messages(self, turns: list[MessageTurn]) -> None:
        """Add the conversation.

        Raises:
            ApiError: 400 for media, a message without content or a result without tool_use_id in
                the turn to be answered, or a last message that cannot be continued.
        """
        past = turns[:-1]  # the last message is to be answered, or continued
        answers = [index for index, turn in enumerate(past) if turn.role == "assistant"]
        turn_start = answers[-1] + 1 if answers else 0
        for index, turn in enumerate(turns):
            path = f"messages[{index}]"
            content = turn.content
            if "content" not in turn.model_fields_set and turn.role != "assistant":
                if index >= turn_start:
                    raise invalid("A message needs content", f"{path}.content")
                self.repairs.append(f"{path}.content")
            blocks = (
                [ContentBlock(type="text", text=content)]
                if isinstance(content, str)
                else content or []
            )
            if turn.role == "assistant":
                self._read_answer(blocks, path, is_last=index == len(turns) - 1)
            elif turn.role == "system":
                self._read_system_blocks(blocks, f"{path}.content")
            else:
                self._read_user(blocks, path, is_past=index < turn_start)

    def _add(self, role: Any, content: Any, path: str, **fields: Any) -> None:
        message = ChatMessage.model_construct(
            {"role", "content", *fields}, role=role, content=content, **fields
        )
        self.messages.append(message.from_path(path))

    def _note(self, block: ContentBlock, path: str, place: Place) -> None:
        self.last_place = place
        if block.cache_control is not None:
            self.controls.append((f"{path}.cache_control", block.cache_control, place))

    def _read_user(self, blocks: list[ContentBlock], path: str, *, is_past: bool) -> None:
        parts: list[ContentPart] = []
        before = len(self.messages)
        for index, block in enumerate(blocks):
            where = f"{path}.content[{index}]"
            if block.type == "tool_result":
                self._flush_user(parts, path)
                parts = []
                self._read_result(block, where, is_past=is_past)
                continue
            text = _document_text(block)
            if text is None and block.type in MEDIA_BLOCKS and not is_past:
                raise _refused(block, where)
            text = self._text_of(block, where) if text is None else text
            if text is not None:
                parts.append(ContentPart(type="text", text=text))
                self._note(block, where, Place(len(self.messages), len(parts) - 1))
        self._flush_user(parts, path)
        if not blocks:
            self._add("user", "", path)
        elif len(self.messages) == before and not is_past:
            raise _refused(blocks[0], f"{path}.content[0]")

    def _flush_user(self, parts: list[ContentPart], path: str) -> None:
        if parts:
            self._add("user", parts, path)

    def _text_of(self, block: ContentBlock, path: str) -> str | None:
        """The text that stands for a block of the past; what is not text is noted."""
        text = block.text if block.type == "text" else _document_text(block)
        if text is not None:
            return text
        self.repairs.append(path)
        return f"[{block.type}]" if block.type in MEDIA_BLOCKS else block.text

    def _read_result(self, block: ContentBlock, path: str, *, is_past: bool) -> None:
        """Add a result; what it has is data, so that nothing of it is refused."""
        if block.tool_use_id is None and not is_past:
            raise invalid("A tool_result needs tool_use_id", f"{path}.tool_use_id")
        parts: list[ContentPart] = []
        if isinstance(block.content, list):
            for index, inner in enumerate(block.content):
                where = f"{path}.content[{index}]"
                text = self._text_of(inner, where)
                if text is not None:
                    parts.append(ContentPart(type="text", text=text))
                    self._note(inner, where, Place(len(self.messages), len(parts) - 1))
        elif isinstance(block.content, dict):
            self.repairs.append(f"{path}.content")
        if not parts:
            text = block.content if isinstance(block.content, str) else ""
            parts.append(ContentPart(type="text", text=text))
        first = parts[0].text or ""
        if block.is_error and not first.lower().startswith(_ERROR[:-1].lower()):
            parts[0] = ContentPart(type="text", text=f"{_ERROR} {first}".rstrip())
        self._note(block, path, Place(len(self.messages), len(parts) - 1))
        self._add("tool", parts, path, tool_call_id=block.tool_use_id)

    def _read_answer(self, blocks: list[ContentBlock], path: str, *, is_last: bool) -> None:
        parts: list[ContentPart] = []
        calls: list[MessageToolCall] = []
        thoughts: list[str] = []
        places: list[tuple[ContentBlock, str, Place]] = []
        number = len(self.messages)
        for index, block in enumerate(blocks):
            where = f"{path}.content[{index}]"
            if block.type == "thinking":
                thoughts.append(block.thinking or "")
            elif block.type == "tool_use":
                calls.append(self._call(block, where))
                places.append((block, where, Place(number, call=len(calls) - 1)))
            elif (text := self._text_of(block, where)) is not None:
                parts.append(ContentPart(type="text", text=text))
                places.append((block, where, Place(number, len(parts) - 1)))
        if is_last:
            self._continue(parts, calls, path)
            if not self.continues:
                return
        for block, where, place in places:
            self._note(block, where, place)
        fields: dict[str, Any] = {}
        if calls:
            fields["tool_calls"] = calls
        if any(thoughts):
            fields["reasoning_content"] = "".join(thoughts)
        self._add("assistant", parts, path, **fields)

    def _call(self, block: ContentBlock, path: str) -> MessageToolCall:
        if block.name is None or not isinstance(block.input, dict):
            self.repairs.append(path)
        function = CalledFunction(name=block.name or "", arguments=block.input)
        return MessageToolCall(id=block.id, function=function)

    def _continue(self, parts: list[ContentPart], calls: list[MessageToolCall], path: str) -> None:
        """Decide whether the answer continues a last message of the assistant; an empty one is the
        same as none."""
        if calls:
            raise invalid("The last message must not be a tool_use; send its tool_result", path)
        text = "\n".join(part.text or "" for part in parts)
        if text and text != text.rstrip():
            raise invalid(
                "The last message of the assistant must not end with white space", f"{path}.content"
            )
        self.continues = bool(text)


def _without_billing(text: str) -> str:
    """A text of the system prompt without a first line of Claude Code about its billing, which is
    another one in each request: no prompt behind it would be found in the cache."""
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _document_text(block: ContentBlock) -> str | None:
    """The text of a document or a search result, below its title; None for another block."""
    given = block.source if isinstance(block.source, dict) else {}
    if block.type == "document" and given.get("type") == "text":
        content = given.get("data")
    elif block.type == "document" and given.get("type") == "content":
        content = given.get("content")
    elif block.type == "search_result":
        content = block.content
    else:
        return None
    if isinstance(content, list):
        parts = [dict(part) if isinstance(part, ContentBlock | dict) else {} for part in content]
        content = _join([part.get("text") for part in parts])
    origin = block.source if isinstance(block.source, str) else None
    return _join([block.title, origin, block.context, content])


def _join(texts: list[Any]) -> str:
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _refused(block: ContentBlock, path: str) -> Exception:
    return invalid(f"Content of type {block.type!r} is not supported; send text", path)
