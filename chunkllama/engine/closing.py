"""Close an answer in JSON before its tokens run out: what is cut inside an object is of no use.

A weak model repeats the members of a list as often as its grammar allows, and no bound of a schema
that leaves room for good answers ends all bad ones in time. So a short end is looked for while an
answer uses up its tokens, and near the limit a token is allowed only if an end fits behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarMatcher

# One token makes the end no longer than by this: opening an object adds its required members. With
# more to spare, every token is allowed.
_RESERVE = 32
# An answer of few tokens is looked at from its beginning on, a longer one in its second half.
_FEW = 128
# Between two looks at most this part of the tokens beyond the reserve is written.
_STEP_PART = 4
# Masks for a look for the end, and for all trials of tokens at one place.
_MAX_MASKS = 256
# So few tokens are tried one by one, more by their kinds.
_FEW_TOKENS = 16
# Of a text inside a string; no JSON outside of strings has it.
_TEXT = b"q"
_CLOSERS = b"}])"
# The bytes of a character in UTF-8 but its first.
_CONTINUATION = bytes(range(0x80, 0xC0))
_WORD, _NUMBER = re.compile(rb"[^0-9,:{}\[\].+-]+"), re.compile(rb"[0-9]+")


def bit(token_id: int) -> int:
    """Return the bit of a token in its 32-bit word, as a signed number."""
    bit = 1 << (token_id % 32)
    return bit - (1 << 32) if bit >> 31 else bit


def allow(mask: NDArray[np.int32], token_id: int) -> None:
    """Set the bit of a token in a mask."""
    mask[token_id // 32] |= np.int32(bit(token_id))


def _token_ids(mask: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the ids of the tokens in a mask, in ascending order."""
    words = np.flatnonzero(mask)
    at = np.flatnonzero(np.unpackbits(mask[words].view(np.uint8), bitorder="little"))
    token_ids: NDArray[np.int64] = words[at >> 5] * 32 + (at & 31)
    return token_ids


def _structure(text: bytes, *, in_text: bool) -> bytes:
    """Return what a token does to the end of JSON: its brackets and quotes, with one byte for each
    number or word. What is inside strings is left out, but for escapes and parts of characters.

    Args:
        in_text: the token begins inside a string.
    """
    parts = list[bytes]()
    for number, part in enumerate(text.split(b'"')):
        parts.append(b'"' if number else b"")
        if b"\\" in part:
            return b"".join([*parts, part[part.index(b"\\") :]])
        if (number % 2 == 0) == in_text:
            parts.append(b"" if part.isascii() else _parts_of_characters(part))
            continue
        part = part.strip()
        parts.append(b"a" if part.isalpha() else _NUMBER.sub(b"0", _WORD.sub(b"a", part)))
    return b"".join(parts)


def _parts_of_characters(text: bytes) -> bytes:
    """Return a byte for each that continues a character at the beginning of a text in UTF-8, and
    for each that its last character lacks.
    """
    num_first = len(text) - len(text.lstrip(_CONTINUATION))
    whole = text.rstrip(_CONTINUATION)
    lead = whole[-1] if whole else 0
    num_expected = (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    num_missing = max(num_expected - (len(text) - len(whole)), 0)
    return b"\x80" * num_first + b"\xc0" * num_missing


class EndTokens:
    """The tokens of a vocabulary by their part in the end of an answer.

    Args:
        token_bytes: the bytes of one token.
        tokenize: the tokens of a text.
        vocab_size: of the tokenizer.
        eos_token_ids: end an answer.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        tokenize: Callable[[bytes], list[int]],
        vocab_size: int,
        eos_token_ids: list[int],
    ) -> None:
        self._token_bytes, self._tokenize = token_bytes, tokenize
        texts = [token_bytes(token_id) for token_id in range(vocab_size)]
        self.lengths = np.array([len(text) for text in texts], np.int32)

        def mask(is_member: Callable[[bytes], bool]) -> NDArray[np.int32]:
            flags = np.zeros(-(-vocab_size // 32) * 32, bool)
            flags[:vocab_size] = [bool(text) and is_member(text) for text in texts]
            return np.packbits(flags, bitorder="little").view(np.int32)

        def kinds(in_text: bool) -> NDArray[np.int32]:
            """Number the kinds of the tokens from the shortest structure on."""
            found = [_structure(text, in_text=in_text) for text in texts]
            order = sorted(set(found), key=lambda kind: (len(kind), kind))
            numbers = {kind: number for number, kind in enumerate(order)}
            return np.array([numbers[kind] for kind in found], np.int32)

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
        self.kinds = kinds(False)
        self.kinds_in_text = kinds(True)

    def next_token(self, matcher: GrammarMatcher) -> int | None:
        """Return a token that leads to the end; None where the answer may end here, or cannot go
        on.

        It follows from the state alone, so that the end of the answer with that token is the rest.
        """
        mask = np.zeros_like(self.ends)
        matcher.fill_mask(mask)
        if bool((mask & self.ends).any()):
            return None
        kinds = [self.closes, self.quotes, self.separates, self.is_plain, mask]
        if bool((mask & self.is_text).any()):  # inside a string a bracket is text
            kinds = [self.ends_text, self.is_plain]
        for kind in kinds:
            token_ids = _token_ids(mask & kind)
            if len(token_ids):
                return int(token_ids[self.lengths[token_ids].argmax()])
        return None

    def end(self, matcher: GrammarMatcher, limit: int) -> list[int] | None:
        """Return at most ``limit`` tokens that end the answer of ``matcher``, which stays as it is;
        None where it takes more or none are found.
        """
        at, found = matcher.copy(), list[int]()
        while len(found) <= min(2 * limit, _MAX_MASKS):
            token_id = None if at.is_finished else self.next_token(at)
            if token_id is None:
                found = found if len(found) < 2 else self._joined(matcher, found)
                return None if at.error or len(found) > limit else found
            if not at.accept(token_id):
                return None
            found.append(token_id)
        return None

    def _joined(self, matcher: GrammarMatcher, found: list[int]) -> list[int]:
        """Return the same text in fewer tokens where the tokenizer has a name and what follows it
        in one.
        """
        joined = self._tokenize(self.text(found))
        at = matcher.copy()
        is_shorter = len(joined) < len(found)
        return joined if is_shorter and all(at.accept(token_id) for token_id in joined) else found

    def num_behind(
        self, matcher: GrammarMatcher, token_id: int, end: list[int], limit: int
    ) -> tuple[int | None, int]:
        """Try a token: the end behind it is sought until it goes on as the end before it does.

        Args:
            end: of ``matcher``, which stays as it is.
            limit: of tokens.

        Returns:
            The number of tokens of the end behind ``token_id``, None where there is none within
            the limit; and the number of masks that were computed.
        """
        at, count = matcher.copy(), 0
        next_id: int | None = token_id
        while next_id is not None and at.accept(next_id):
            for num_same in range(min(len(end), limit - count) + 1):
                if at.may_end_behind(end[len(end) - num_same :]):
                    return count + num_same, count
            if count >= limit:
                return None, count
            next_id = self.next_token(at)
            count += 1
        return None, count

    def mask_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the mask of some tokens."""
        flags = np.zeros(len(self.ends) * 32, bool)
        flags[token_ids] = True
        return np.packbits(flags, bitorder="little").view(np.int32)

    def text(self, token_ids: list[int]) -> bytes:
        """Return the text of some tokens."""
        return b"".join(self._token_bytes(token_id) for token_id in token_ids)

    def groups(self, mask: NDArray[np.int32]) -> list[NDArray[np.int64]]:
        """Return the ids of a mask in groups, of which each has about the same effect on the end.

        Those of plain text come first, those that open and close most come last.
        """
        token_ids = _token_ids(mask)
        if len(token_ids) <= _FEW_TOKENS:
            return [token_ids[i : i + 1] for i in range(len(token_ids))]
        kinds = (self.kinds_in_text if (mask & self.is_text).any() else self.kinds)[token_ids]
        order = np.argsort(kinds, kind="stable")
        return np.split(token_ids[order], np.flatnonzero(np.diff(kinds[order])) + 1)


class ClosingMatcher:
    """A grammar of JSON that allows near the limit only tokens behind which its end fits.

    What it allows follows from the tokens so far, so that a sequence which is computed again closes
    in the same place. It looks where a mask is filled, which the step loop does not wait for.

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
        # By the tokens left: where nothing but the end fitted. Copies, which fill the masks behind
        # guesses, share it.
        self._closed_at: set[int] = set()
        self._is_closing = False
        self._end: list[int] | None = None  # the last that was found, while it is followed
        self._spare: int | None = None  # tokens beside the end; None where it was not looked for

    @property
    def is_closing(self) -> bool:
        """Return whether a token was written because only the end of the answer still fitted."""
        return self._is_closing

    def spend(self) -> None:
        """Count a token that the grammar does not see."""
        self._num_left -= 1

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self._matcher.fill_mask(mask)
        self._closed_at.discard(self._num_left)
        self._spare = None
        if self._num_left > self._look_at or self._matcher.error:
            return
        end = self._tokens.end(self._matcher, self._num_left)
        # From inside a joined token another text may be found, which is longer.
        if end is None or (self._end is not None and len(self._end) < len(end)):
            end = self._end
        self._end = end
        if end is None:  # it may stay too long: look a few more times only
            self._look_at = self._num_left // 2
            return
        self._spare = self._num_left - len(end)
        self._look_at = self._num_left - max((self._spare - _RESERVE) // _STEP_PART, 1)
        if self._spare <= _RESERVE:
            self._narrow(mask, end)

    def _narrow(self, mask: NDArray[np.int32], end: list[int]) -> None:
        """Remove the tokens from a mask behind which no end fits."""
        tokens, left, budget = self._tokens, self._num_left - 1, _MAX_MASKS
        text = tokens.text(end)
        kept = mask & tokens.ends
        if end:
            allow(kept, end[0])
        goes_on = False
        for group in [] if len(end) > left else tokens.groups(mask & ~kept):
            num_behind, num_masks = tokens.num_behind(
                self._matcher, int(group[0]), end, min(left, budget)
            )
            budget -= num_masks
            if num_behind is not None:
                kept |= tokens.mask_of(group)
                goes_on |= not all(
                    text.startswith(tokens.text([int(token_id)]).strip())
                    for token_id in (group[0], group[-1])
                )
            if budget <= 0:
                break
        if not goes_on and bool((mask != kept).any()):
            self._closed_at.add(self._num_left)
        mask[:] = kept

    def has_room(self, num_tokens: int) -> bool:
        """Return whether the last mask leaves room for so many tokens beside a short end."""
        return self._spare is None or self._spare >= num_tokens

    @property
    def error(self) -> str:
        return self._matcher.error

    def accept(self, token_id: int) -> bool:
        self._is_closing |= self._num_left in self._closed_at
        self._num_left -= 1
        self._end = self._end[1:] if self._end and self._end[0] == token_id else None
        return self._matcher.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_finished

    def copy(self) -> ClosingMatcher:
        other = copy(self)
        other._matcher = self._matcher.copy()
        return other

    def forced(self) -> list[int]:
        return self._matcher.forced()
