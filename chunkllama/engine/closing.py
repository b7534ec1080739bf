"""Close an answer in JSON before its tokens run out: what is cut inside an object is of no use.

A weak model repeats the members of a list as often as its grammar allows, and no bound of a schema
that leaves room for good answers ends all bad ones in time. So a short end is looked for now and
then while an answer uses up its tokens, and is written when no more than that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarMatcher

# Tokens kept beside those of the end, as a part of all and at most, or as many as the end has grown
# by: opening an object adds its required members.
_RESERVED_PART, _RESERVE = 8, 32
# Between two looks at least so many tokens are written, and at most a part of those to spare.
_LEAST_STEP, _STEP_PART = 8, 4
# An answer of few tokens is looked at from its beginning on, a longer one in its second half.
_FEW = 128
_LONGEST_END = 1024
# Of a text inside a string; no JSON outside of strings has it.
_TEXT = b"q"
_CLOSERS = b"}])"


def bit(token_id: int) -> int:
    """The bit of a token in its 32-bit word, as a signed number."""
    bit = 1 << (token_id % 32)
    return bit - (1 << 32) if bit >> 31 else bit


def allow(mask: NDArray[np.int32], token_id: int) -> None:
    """Set the bit of a token in a mask."""
    mask[token_id // 32] |= np.int32(bit(token_id))


class EndTokens:
    """The tokens of a vocabulary by their part in the end of an answer.

    Args:
        token_bytes: the bytes of one token.
        vocab_size: of the tokenizer.
        eos_token_ids: end an answer.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], vocab_size: int, eos_token_ids: list[int]
    ) -> None:
        texts = [token_bytes(token_id) for token_id in range(vocab_size)]
        self.lengths = np.array([len(text) for text in texts], np.int32)

        def mask(is_member: Callable[[bytes], bool]) -> NDArray[np.int32]:
            flags = np.zeros(-(-vocab_size // 32) * 32, bool)
            flags[:vocab_size] = [bool(text) and is_member(text) for text in texts]
            return np.packbits(flags, bitorder="little").view(np.int32)

        self.is_text = mask(lambda text: text == _TEXT)
        self.closes = mask(lambda text: not text.strip(_CLOSERS))
        self.ends_text = mask(lambda text: text[:1] == b'"' and not text[1:].strip(_CLOSERS))
        self.quotes = mask(lambda text: text in (b'"', b'""'))
        self.separates = mask(lambda text: text in (b",", b":"))
        # Anything else, but what opens another value or is blank.
        self.is_plain = mask(lambda text: text.strip()[:1] not in (b"", b"[", b"{", b"(", b"-"))
        self.ends = np.zeros_like(self.closes)
        for token_id in eos_token_ids:
            allow(self.ends, token_id)

    def next_token(self, matcher: GrammarMatcher) -> int | None:
        """A token that leads to the end; None where the answer may end here, or cannot go on."""
        mask = np.zeros_like(self.ends)
        matcher.fill_mask(mask)
        if bool((mask & self.ends).any()):
            return None
        kinds = [self.closes, self.quotes, self.separates, self.is_plain, mask]
        if bool((mask & self.is_text).any()):  # inside a string a bracket is text
            kinds = [self.ends_text, self.is_plain]
        for kind in kinds:
            both = mask & kind
            words = np.flatnonzero(both)
            if len(words):
                at = np.flatnonzero(np.unpackbits(both[words].view(np.uint8), bitorder="little"))
                token_ids = words[at >> 5] * 32 + (at & 31)
                return int(token_ids[self.lengths[token_ids].argmax()])
        return None


class ClosingMatcher:
    """A grammar of JSON that is closed when its tokens run out.

    The tokens alone decide where it closes: it is looked at after fixed numbers of them, so that a
    sequence which is computed again closes in the same place.

    Args:
        matcher: before the first token.
        num_tokens: that the output may have.
        tokens: of the vocabulary.
    """

    def __init__(self, matcher: GrammarMatcher, num_tokens: int, tokens: EndTokens) -> None:
        self._matcher = matcher
        self._num_left = num_tokens
        self._tokens = tokens
        self._look_at = num_tokens if num_tokens <= _FEW else num_tokens // 2
        self._reserve = min(num_tokens // _RESERVED_PART, _RESERVE)
        self._end_tokens = 0  # of the last end that was found
        self._step = max(min(self._reserve, _LEAST_STEP), 1)
        self._end: list[int] | None = None  # what is still to be written

    @property
    def is_closing(self) -> bool:
        """The rest of the answer is no longer the model's."""
        return self._end is not None

    def spend(self) -> None:
        """Count a token that the grammar does not see."""
        self._num_left -= 1

    def _look(self) -> None:
        """Look for the end where it is due, and close if just that fits."""
        if self._end is not None or self._num_left > self._look_at:
            return
        end = self._short_end()
        if end is not None:
            if self._end_tokens:
                self._reserve = max(self._reserve, len(end) - self._end_tokens)
            self._end_tokens = len(end)
        spare = self._num_left - self._reserve - self._end_tokens
        if end is not None and spare <= 0 and len(end) <= self._num_left:
            self._end = end
        self._look_at = self._num_left - max(self._step, spare // _STEP_PART)

    def _short_end(self) -> list[int] | None:
        """Tokens that end the answer; None where it takes too many or none is found."""
        matcher, found = self._matcher.copy(), list[int]()
        while len(found) <= min(self._num_left, _LONGEST_END):
            token_id = None if matcher.is_finished else self._tokens.next_token(matcher)
            if token_id is None:
                return None if matcher.error else found
            if not matcher.accept(token_id):
                return None
            found.append(token_id)
        return None

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self._look()
        if self._end:
            allow(mask, self._end[0])
        else:
            self._matcher.fill_mask(mask)

    @property
    def error(self) -> str:
        return self._matcher.error

    def accept(self, token_id: int) -> bool:
        self._look()
        self._num_left -= 1
        if self._end:
            self._end = self._end[1:]
        return self._matcher.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_finished or self._end == []

    def copy(self) -> ClosingMatcher:
        other = copy(self)
        other._matcher = self._matcher.copy()
        return other

    def forced(self) -> list[int]:
        self._look()
        return self._matcher.forced() if self._end is None else list(self._end)
