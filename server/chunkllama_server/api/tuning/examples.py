"""Lines of conversations to train on, as token ids and which of them are trained.

An answer's tokens are those that its conversation has behind the prompt that asks for it, up to the
end of the turn. So the model learns to write what it will be asked for, in the template's form.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from chunkllama.errors import InvalidRequestError
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.template_adapter import adapt
from chunkllama.tuning.folder import Example
from chunkllama_server.api.chat.history import normalise
from chunkllama_server.api.common.prompt_cache import common_prefix
from chunkllama_server.api.schema.chat import ROLES, ChatMessage, ChatTool
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.body import parse_json
from chunkllama_server.transport.errors import ApiError

_FIELDS: Final = frozenset(("messages", "tools", "parallel_tool_calls"))
_CODE: Final = "invalid_training_file"
_MAX_TEXT: Final = 300  # of what an error quotes


class _LineError(Exception):
    """What is wrong with a line, with the field's path before it."""


class ExampleReader:
    """Reads files of conversations.

    Args:
        template: None where the model has none; every file is refused then.
        eos_token_ids: that end a turn.
        max_lines: of a file.
        max_tokens: of a conversation.
        limits: of a line, as of a request's body.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        eos_token_ids: frozenset[int],
        max_lines: int,
        max_tokens: int,
        limits: LimitsConfig,
    ) -> None:
        self._template = template
        self._eos_token_ids = eos_token_ids
        self._max_lines = max_lines
        self._max_tokens = max_tokens
        self._limits = limits

    def read(self, path: Path) -> list[Example]:
        """Read a file, one JSON object a line; blank lines are skipped.

        Raises:
            InvalidRequestError: it cannot be trained on; the message names the line and the field.
            FileNotFoundError: it has been deleted.
        """
        if self._template is None:
            raise InvalidRequestError("the model has no chat template", "model", _CODE)
        examples: list[Example] = []
        for number, raw in self._lines(path):
            try:
                examples.append(self._example(raw))
            except _LineError as error:
                raise _refused(number, str(error)) from None
            time.sleep(0)  # for the event loop, if this is one of its threads
        if not examples:
            raise InvalidRequestError("the file has no line", "training_file", _CODE)
        return examples

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        most = self._limits.max_body_bytes
        count = 0
        with path.open("rb") as file:
            for number in range(1, 1 << 62):
                raw = file.readline(most + 1)
                if not raw:
                    return
                if len(raw) > most:
                    raise _refused(number, f"is larger than {most} bytes")
                if not raw.strip():
                    continue
                count += 1
                if count > self._max_lines:
                    raise _refused(number, f"a file has at most {self._max_lines} lines")
                yield number, raw

    def _example(self, raw: bytes) -> Example:
        try:
            entry = parse_json(raw, None, self._limits)
        except ApiError as error:
            raise _LineError(error.message.replace("The request body", "the line")) from None
        if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
            raise _LineError('must be an object like {"messages": [...]}')
        for name in entry:
            if name not in _FIELDS:
                raise _LineError(f"{name[:64]}: is not supported; use {', '.join(sorted(_FIELDS))}")
        tools = _tools(entry.get("tools"))
        wanted = _trained(entry["messages"])
        parsed = [_message(index, message) for index, message in enumerate(entry["messages"])]
        try:
            history = normalise(parsed)
        except ApiError as error:
            raise _LineError(f"{error.param}: {error.message}") from None
        if history.repairs:
            raise _LineError(f"{history.repairs[0]}: cannot be used as it is")
        try:
            return self._encode(history.messages, tools, wanted)
        except InvalidRequestError as error:
            raise _LineError(f"messages: {error.message}") from None

    def _encode(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, wanted: list[int]
    ) -> Example:
        ids = self._render(messages, tools)
        if len(ids) > self._max_tokens:
            raise _LineError(f"has {len(ids)} tokens; at most {self._max_tokens} are trained")
        targets: list[int] = []
        for index in wanted:
            asked = self._render(messages[:index], tools, asks=True)
            begin = common_prefix(ids, asked)
            end = common_prefix(ids, self._render(messages[: index + 1], tools))
            ends = [at for at in range(begin, end) if ids[at] in self._eos_token_ids]
            end = ends[-1] + 1 if ends else end
            if not 0 < begin < end:
                raise _LineError(f"messages[{index}]: the chat template leaves out this answer")
            targets += range(begin, end)
        return Example(ids, sorted(set(targets)))

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        asks: bool = False,
    ) -> list[int]:
        assert self._template is not None
        shown, shown_tools = adapt(messages, tools, self._template.capabilities)
        return self._template.encode(
            shown, tools=shown_tools, add_generation_prompt=asks, require_all_text=not asks
        )


def _refused(number: int, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"line {number}: {why[:_MAX_TEXT]}", "training_file", _CODE)


def _trained(messages: list[Any]) -> list[int]:
    """Indices of the answers that are trained: those without ``weight: 0``."""
    wanted = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _LineError(f"{path}: must be an object with role and content")
        role, weight = message.get("role"), message.get("weight")
        if role not in ROLES:
            raise _LineError(f"{path}.role: must be one of {', '.join(ROLES)}")
        if weight is not None and (role != "assistant" or weight not in (0, 1)):
            raise _LineError(f"{path}.weight: must be 0 or 1, and of an assistant's message")
        if role != "assistant":
            continue
        if index == 0:
            raise _LineError(f"{path}.role: an answer cannot be the first message")
        if weight != 0:
            wanted.append(index)
    if not wanted:
        raise _LineError("messages: no message of the assistant is trained")
    return wanted


def _message(index: int, message: dict[str, Any]) -> ChatMessage:
    own = {name: value for name, value in message.items() if name != "weight"}
    try:
        parsed = ChatMessage.model_validate(own)
    except ValidationError as error:
        raise _LineError(_first(f"messages[{index}]", error)) from None
    for name in parsed.model_extra or {}:
        raise _LineError(f"messages[{index}].{name[:64]}: is not supported")
    return parsed


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, list):
        raise _LineError("tools: must be a list")
    tools = []
    for index, tool in enumerate(given):
        try:
            parsed = ChatTool.model_validate(tool)
        except ValidationError as error:
            raise _LineError(_first(f"tools[{index}]", error)) from None
        if parsed.type != "function" or parsed.function is None:
            raise _LineError(f"tools[{index}]: must be a function")
        tools.append(tool)
    return tools or None


def _first(path: str, error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False)[0]
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    return f"{path}{parts}: {detail['msg']}"
