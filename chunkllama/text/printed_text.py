"""Find the messages of a conversation in its prompt: no text is dropped silently."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Final

from chunkllama.errors import InvalidRequestError
from chunkllama.text.template_budget import TemplateBudget, TemplateLimitError
from chunkllama.text.template_capabilities import Message

FIND_SECONDS: Final = 1.0  # of its thread's own time, to look for all texts of a conversation
# How a template may print a text; "words" is with other white space.
_SPELLINGS: Final = ("plain", "json", "ascii", "words")


class _Printed:
    """Looks for texts in a prompt, in the order in which they are printed.

    A text that is not found is looked for through the whole prompt, so the spelling in which the
    last one of its role was printed comes first, behind that one.
    """

    def __init__(self, rendered: str) -> None:
        self._rendered = rendered
        self._starts = dict.fromkeys(_SPELLINGS, 0)
        self._usual: dict[str, str] = {}
        self._budget = TemplateBudget(FIND_SECONDS, work=0, output=0)

    def has(self, role: str, text: str) -> bool:
        """Return whether a text is in the prompt.

        Raises:
            TemplateLimitError: the search took too long.
        """
        usual = self._usual.get(role, _SPELLINGS[0])
        for name in (usual, *(name for name in _SPELLINGS if name != usual)):
            found = self._find(name, text, self._starts[name])
            if found >= 0:
                self._starts[name], self._usual[role] = found, name
                return True
        return any(self._find(name, text, 0) >= 0 for name in _SPELLINGS)

    @cached_property
    def _words(self) -> str:
        return " ".join(self._rendered.split())

    def _find(self, name: str, text: str, start: int) -> int:
        self._budget.tick()
        if name == "words":
            return self._words.find(" ".join(text.split()), start)
        if name != "plain":
            text = json.dumps(text, ensure_ascii=name == "ascii")[1:-1]
        return self._rendered.find(text, start)


def find_dropped(messages: list[Message], rendered: str) -> int | None:
    """Index of the first message whose text is not in the rendered prompt, None if all are.

    White space may be trimmed and written in another way, a text may be written as JSON, and of an
    assistant's text the thoughts before ``</think>`` may be left out.

    Raises:
        TemplateLimitError: the search took too long.
    """
    printed = _Printed(rendered)
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            text = str(part.get("text") or "")
            if message["role"] == "assistant":
                text = text.rpartition("</think>")[2]
            if not printed.has(message["role"], text.strip()):
                return index
    return None


def check_all_text(messages: list[Message], rendered: str) -> None:
    """Refuse a prompt that lacks a message's text.

    Raises:
        InvalidRequestError: naming the message's role and place; or the search took too long.
    """
    try:
        dropped = find_dropped(messages, rendered)
    except TemplateLimitError as error:
        raise InvalidRequestError(
            f"the search for the messages in the prompt was stopped: {error}; send fewer messages",
            "messages",
            "chat_template_stopped",
        ) from None
    if dropped is not None:
        raise InvalidRequestError(
            f"the chat template leaves out the text of a {messages[dropped]['role']} message "
            f"(number {dropped + 1} as it reads them)",
            "messages",
            "chat_template_drops_text",
        )
