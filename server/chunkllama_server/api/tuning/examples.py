"""Lines of conversations to train on, as token ids and which of them are trained.

An answer's tokens are those that its conversation has behind the prompt that asks for it, up to the
end of the turn. So the model learns to write what it will be asked for, in the template's form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


class StoppedError(Exception):
    """The caller no longer wants the file."""


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bounds of a training file.

    Attributes:
        lines: of the file.
        answers: of a line, that are trained.
        tokens: that the file is rendered to. An answer is found by rendering its conversation
            twice, without it and with it, so that these tokens count beside those of the whole.
    """

    lines: int
    answers: int
    tokens: int


class _Reading:
    """What the reading of one file has rendered."""

    def __init__(self, max_tokens: int, is_stopped: Callable[[], bool]) -> None:
        self._max_tokens = max_tokens
        self._is_stopped = is_stopped
        self._num_tokens = 0

    def check(self) -> None:
        """Go on, unless the caller has left; other threads have a turn before that."""
        time.sleep(0)
        if self._is_stopped():
            raise StoppedError

    def count(self, ids: list[int]) -> list[int]:
        """Count what has been rendered; returns it."""
        self._num_tokens += len(ids)
        if self._num_tokens > self._max_tokens:
            raise _LineError(
                f"a file is rendered to at most {self._max_tokens} tokens, where each trained "
                "answer counts its conversation twice more; split the file, or give answers "
                "weight 0"
            )
        return ids


class ExampleReader:
    """Reads files of conversations.

    Args:
        template: None where the model has none; every file is refused then.
        eos_token_ids: that end a turn.
        max_tokens: of a conversation.
        file_limits: of a file.
        limits: of a line, as of a request's body.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        file_limits: FileLimits,
        limits: LimitsConfig,
    ) -> None:
        self._template = template
        self._eos_token_ids = eos_token_ids
        self._max_tokens = max_tokens
        self._file_limits = file_limits
        self._limits = limits

    def read(self, path: Path, is_stopped: Callable[[], bool] = lambda: False) -> list[Example]:
        """Read a file, one JSON object a line; blank lines are skipped.

        Args:
            is_stopped: asked before each line and each answer whether to end.

        Raises:
            StoppedError: ``is_stopped`` said so.
            InvalidRequestError: it cannot be trained on; the message names the line and the field.
            FileNotFoundError: it has been deleted.
        """
        if self._template is None:
            raise InvalidRequestError("the model has no chat template", "model", _CODE)
        examples: list[Example] = []
        reading = _Reading(self._file_limits.tokens, is_stopped)
        for number, raw in self._lines(path):
            reading.check()
            try:
                examples.append(self._example(raw, reading))
            except _LineError as error:
                raise _refused(number, str(error)) from None
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
                if count > self._file_limits.lines:
                    raise _refused(number, f"a file has at most {self._file_limits.lines} lines")
                yield number, raw

    def _example(self, raw: bytes, reading: _Reading) -> Example:
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
        most = self._file_limits.answers
        if len(wanted) > most:
            raise _LineError(
                f"messages: {len(wanted)} answers are trained, at most {most} of a line can be; "
                "split the conversation, or give answers weight 0"
            )
        parsed = [_message(index, message) for index, message in enumerate(entry["messages"])]
        try:
            history = normalise(parsed)
        except ApiError as error:
            raise _LineError(f"{error.param}: {error.message}") from None
        if history.repairs:
            raise _LineError(f"{history.repairs[0]}: cannot be used as it is")
        try:
            return self._encode(history.messages, tools, wanted, reading)
        except InvalidRequestError as error:
            raise _LineError(f"messages: {error.message}") from None

    def _encode(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        wanted: list[int],
        reading: _Reading,
    ) -> Example:
        ids = reading.count(self._render(messages, tools))
        if len(ids) > self._max_tokens:
            raise _LineError(f"has {len(ids)} tokens; at most {self._max_tokens} are trained")
        targets: list[int] = []
        for index in wanted:
            reading.check()
            asked = reading.count(self._render(messages[:index], tools, asks=True))
            begin = common_prefix(ids, asked)
            answered = reading.count(self._render(messages[: index + 1], tools))
            end = common_prefix(ids, answered)
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
