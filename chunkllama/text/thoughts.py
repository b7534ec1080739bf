"""Tell a model's thoughts from its answer: the text between ``<think>`` and ``</think>``, or
between other tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from chunkllama.text.partial_match import partial_end
from chunkllama.text.tokenizer import Tokenizer

_SPACE = " \t\r\n"


class ThoughtTags(NamedTuple):
    """The tags around thoughts."""

    start: str
    end: str


# What published chat templates use; the first is by far the most common.
KNOWN_TAGS = (
    ThoughtTags("<think>", "</think>"),
    ThoughtTags("[THINK]", "[/THINK]"),
    ThoughtTags("<seed:think>", "</seed:think>"),
    ThoughtTags("<thought>", "</thought>"),
)


def tag_ids(tags: ThoughtTags | None, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tags that are special tokens: decoding leaves them out unless asked for."""
    ids = (tokenizer.token_id(tag) for tag in tags or ())
    return frozenset(i for i in ids if i is not None and i in tokenizer.special_ids)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How the thoughts of one answer are separated from it.

    Attributes:
        tags: around them; None where the model has none.
        is_open: the prompt has written the starting tag.
        shown_ids: special tokens that are text although special tokens are skipped: these tags, and
            those of tool calls.
    """

    tags: ThoughtTags | None = None
    is_open: bool = False
    shown_ids: frozenset[int] = frozenset()


NO_THOUGHTS = Thoughts()


class ThoughtSplitter:
    """Splits one text as it streams; however it is cut, the parts are the same.

    Thoughts stand at the beginning of the text only. White space around them and between them and
    the answer belongs to neither.

    Args:
        thoughts: without tags, all text is the answer.

    Attributes:
        has_thoughts: the text began with thoughts.
        is_answer: what follows is the answer.
    """

    def __init__(self, thoughts: Thoughts) -> None:
        self._tags = thoughts.tags
        self.has_thoughts = thoughts.is_open and thoughts.tags is not None
        self.is_answer = thoughts.tags is None
        # Whether the tags' text, white space, or both are still to be removed at the beginning.
        self._is_begun = False
        self._strips = False
        self._text = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Take the next text; returns the thoughts and the answer that are certain now."""
        if self.is_answer or self._tags is None:
            return "", self._answer(text)
        self._text += text
        if not self._is_begun:
            stripped = self._text.lstrip(_SPACE)
            if self._tags.start.startswith(stripped) and stripped != self._tags.start:
                return "", ""
            self._begin(stripped, self._tags.start)
        return self._read_thoughts() if self.has_thoughts else ("", self._take())

    def _begin(self, stripped: str, start: str) -> None:
        """Thoughts, or else an answer, are known to begin."""
        self._is_begun = True
        if stripped.startswith(start):
            self.has_thoughts = True
            self._text = stripped[len(start) :]
        self.is_answer = not self.has_thoughts
        self._strips = self.has_thoughts

    def _read_thoughts(self) -> tuple[str, str]:
        assert self._tags is not None
        if self._strips:
            self._text = self._text.lstrip(_SPACE)
            self._strips = not self._text
        end = self._text.find(self._tags.end)
        if end >= 0:
            thoughts = self._text[:end].rstrip(_SPACE)
            self._text = self._text[end + len(self._tags.end) :]
            self.is_answer = self._strips = True
            return thoughts, self._answer(self._take())
        held = partial_end(self._text, self._tags.end)
        body = self._text[: len(self._text) - held]
        thoughts = body.rstrip(_SPACE)
        self._text = self._text[len(thoughts) :]
        return thoughts, ""

    def _answer(self, text: str) -> str:
        if self._strips:
            text = text.lstrip(_SPACE)
            self._strips = not text
        return text

    def _take(self) -> str:
        text, self._text = self._text, ""
        return text

    def finish(self) -> tuple[str, str]:
        """The text that was held back; no text follows."""
        text = self._take()
        if self.has_thoughts:
            return text.rstrip(_SPACE), ""
        self.is_answer = True
        return "", text
