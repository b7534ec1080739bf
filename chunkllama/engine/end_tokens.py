"""The tokens of a vocabulary by their part in the end of JSON."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.token_masks import allow, token_ids_of

# So few tokens are tried one by one, more by their kinds.
_FEW_TOKENS = 16
_CLOSERS, _EMPTY, _OPENERS = b"}])", (b"[]", b"{}"), (b"[", b"{", b'{"')
# A string that allows these, and its end, allows any character.
_ANY_TEXT = (b'"', b"q", b"0", b" ", b".", b"@", b"-")
# The bytes of a character in UTF-8 but its first.
_CONTINUATION = bytes(range(0x80, 0xC0))
_WORD, _NUMBER = re.compile(rb"[^0-9,:{}\[\].+-]+"), re.compile(rb"[0-9]+")


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


def _last_class(text: bytes) -> int:
    """Return a number of the last character of a text; letters and digits have one each."""
    last = text[-1:]
    if not last.isascii():
        return 0
    if last.isalnum():
        return ord("a") if last.isalpha() else ord("0")
    return last[0] if last else 0


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
        self.token_bytes, self.tokenize = token_bytes, tokenize
        texts = [token_bytes(token_id) for token_id in range(vocab_size)]
        self.lengths = np.array([len(text) for text in texts], np.int32)

        def mask(is_member: Callable[[bytes], bool]) -> NDArray[np.int32]:
            flags = np.zeros(-(-vocab_size // 32) * 32, bool)
            flags[:vocab_size] = [bool(text) and is_member(text) for text in texts]
            return np.packbits(flags, bitorder="little").view(np.int32)

        def kinds(in_text: bool) -> NDArray[np.int64]:
            """Number the kinds of the tokens from the shortest structure on."""
            found = [_structure(text, in_text=in_text) for text in texts]
            order = sorted(set(found), key=lambda kind: (len(kind), kind))
            numbers = {kind: number for number, kind in enumerate(order)}
            return np.array([numbers[kind] for kind in found], np.int64)

        self.closes = mask(lambda text: not text.strip(_CLOSERS))
        self.ends_text = mask(lambda text: text[:1] == b'"' and not text[1:].strip(_CLOSERS))
        self.quotes = mask(lambda text: text in (b'"', b'""'))
        self.separates = mask(lambda text: text in (b",", b":"))
        self.empties = mask(lambda text: text[:2] in _EMPTY and not text[2:].strip(_CLOSERS))
        self.opens = mask(lambda text: text in _OPENERS)
        # Anything else, but what opens another value or is blank.
        self.is_plain = mask(lambda text: text.strip()[:1] not in (b"", b"[", b"{", b"(", b"-"))
        self.ends = np.zeros_like(self.closes)
        for token_id in eos_token_ids:
            allow(self.ends, token_id)
        self._any_text = mask(lambda text: text in _ANY_TEXT)
        self._begins_character = mask(lambda text: text[0] < 0x80)
        self._kinds, self._kinds_in_text = kinds(False), kinds(True)
        self._last = np.array([_last_class(text) for text in texts], np.int64)

    def text(self, token_ids: list[int]) -> bytes:
        """Return the text of some tokens."""
        return b"".join(self.token_bytes(token_id) for token_id in token_ids)

    def longest(self, mask: NDArray[np.int32]) -> int | None:
        """Return the token of a mask with the longest text; None where it is empty."""
        token_ids = token_ids_of(mask)
        return int(token_ids[self.lengths[token_ids].argmax()]) if len(token_ids) else None

    def takes_any_text(self, mask: NDArray[np.int32]) -> bool:
        """Return whether a string in which a mask holds takes any character."""
        return not (self._any_text & ~mask).any()

    def may_begin_character(self, mask: NDArray[np.int32]) -> bool:
        """Return whether a mask allows ASCII: not where a character in UTF-8 has begun."""
        return bool((self._begins_character & mask).any())

    def groups(self, mask: NDArray[np.int32], *, in_text: bool) -> list[NDArray[np.int64]]:
        """Return the ids of a mask in groups, of which each has about the same effect on the end.

        Those of plain text come first, those that open and close most come last. In a string that
        does not allow any character, the last one of a token decides what may follow.

        Args:
            in_text: a string is open.
        """
        token_ids = token_ids_of(mask)
        if len(token_ids) <= _FEW_TOKENS:
            return [token_ids[i : i + 1] for i in range(len(token_ids))]
        kinds = (self._kinds_in_text if in_text else self._kinds)[token_ids]
        if in_text and not self.takes_any_text(mask):
            kinds = kinds * 128 + self._last[token_ids]
        order = np.argsort(kinds, kind="stable")
        return np.split(token_ids[order], np.flatnonzero(np.diff(kinds[order])) + 1)
