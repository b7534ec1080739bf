"""Decode a growing list of token ids: emit whole characters, hold back possible stop strings."""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Collection, Sequence

from chunkllama.text.tokenizer import Tokenizer

# A character or byte run spans few tokens: this many prompt tokens determine the state that an
# answer starts in.
_CONTEXT_TOKENS = 16


class IncrementalDetokenizer:
    """Streams exactly ``tokenizer.decode(all ids)``: never part of a character, never revised.

    Args:
        prompt_ids: tokens that the answer continues (completions); the answer then keeps its
            leading space. Without them the answer is a text of its own (chat).
        shown_ids: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int] = (),
        shown_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._skipped = skipped.difference(shown_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_run = bytearray()
        self._strip_left = tokenizer.rule.strip_left
        if prompt_ids:
            self.add(prompt_ids[-_CONTEXT_TOKENS:])
            self._strip_left = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that the new ids complete."""
        if self._tokenizer.rule.byte_level:
            return self._utf8.decode(
                b"".join(
                    self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped
                )
            )
        return self._strip("".join(self._piece(i) for i in token_ids if i not in self._skipped))

    def finish(self) -> str:
        """Return the held bytes; an incomplete character becomes U+FFFD."""
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
        """Decode the held run of bytes as a whole: one invalid byte makes each byte a U+FFFD."""
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
    """Finds the stop string that is complete first, independent of how the text is cut.

    Args:
        stops: non-empty strings.
        include: keep the stop string in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = sorted(set(stops))
        self._longest = max(map(len, stops), default=0)
        self._include = include
        self._held = ""

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return (text safe to send, the stop string found or None); feed nothing after a match.

        Args:
            may_stop: False lets stop strings that end in ``text`` pass.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            # What ends in the held text has been let pass already.
            if (start := buffer.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
        ]
        if found and may_stop:
            self._held = ""
            end, start, stop = min(found)
            return buffer[: end if self._include else start], stop
        cut = len(buffer) - self._num_held(buffer)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of the text that begins a stop string and is not all of it.

        A text that begins one of the sorted strings begins the first that sorts behind it, so that
        the time does not grow with their number.
        """
        for length in range(min(len(buffer), self._longest - 1), 0, -1):
            end = buffer[-length:]
            place = bisect_right(self._stops, end)
            if place < len(self._stops) and self._stops[place].startswith(end):
                return length
        return 0

    def flush(self) -> str:
        """Return the text that was held back for a possible stop string."""
        held, self._held = self._held, ""
        return held
