"""Text of a growing answer, a few ids at a time: whole characters only, and nothing that a stop
string may eat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from chunkllama.text.tokenizer import Tokenizer

# A character or byte run spans a handful of tokens: this many prompt tokens settle the state an
# answer starts in.
_CONTEXT_TOKENS = 16


class IncrementalDetokenizer:
    """Streams exactly ``tokenizer.decode(all ids)``, never part of a character and never taken
    back.

    Args:
        prompt_ids: tokens the answer continues (completions): the text then is what follows theirs,
            its leading space kept. Without them the answer is a text of its own (chat).
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_run = bytearray()
        self._strip_left = tokenizer.rule.strip_left
        if prompt_ids:
            self.add(prompt_ids[-_CONTEXT_TOKENS:])
            self._strip_left = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that the new ids complete."""
        if self._tokenizer.rule.byte_level:
            return self._utf8.decode(
                b"".join(
                    self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped
                )
            )
        return self._strip("".join(self._piece(i) for i in token_ids if i not in self._skipped))

    def finish(self) -> str:
        """What was held back; a character that never became whole is U+FFFD."""
        if self._tokenizer.rule.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._strip(self._end_byte_run())

    def _piece(self, token_id: int) -> str:
        byte = self._tokenizer.fallback_byte(token_id)
        if byte is not None:
            self._byte_run.append(byte)
            return ""
        text = self._tokenizer.token_bytes(token_id).decode()
        return self._end_byte_run() + text if text else ""

    def _end_byte_run(self) -> str:
        """A run of byte pieces is text only as a whole: one bad byte makes each of its bytes a
        U+FFFD."""
        run = bytes(self._byte_run)
        self._byte_run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        stripped = text
        while self._strip_left and stripped.startswith(" "):
            stripped = stripped[1:]
            self._strip_left -= 1
        if stripped:
            self._strip_left = 0
        return stripped


class StopChecker:
    """Finds the first stop string to become complete, however the text is cut into pieces.

    Args:
        stops: non-empty strings.
        include: keep the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text safe to send, the stop string found or None); after a match nothing more is to be
        fed."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := buffer.find(stop)) >= 0
        ]
        if found:
            self._held = ""
            end, start, stop = min(found)
            return buffer[: end if self._include else start], stop
        held = max(_overlap(buffer, stop) for stop in self._stops)
        cut = len(buffer) - held
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """Text held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
