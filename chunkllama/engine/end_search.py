"""Search for short ends of answers in JSON, by masks of their grammar."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.end_texts import EndTexts
from chunkllama.engine.end_tokens import EndTokens
from chunkllama.engine.token_masks import is_allowed

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarMatcher

# Tokens of an end, and masks that a search for it takes.
MAX_END = 256
# Of the texts that may end a string, with all that they end in.
_MAX_TEXTS = 256
# What begins with no open string: text outside of strings, and whole strings.
_SETTLED = re.compile(rb'(?:[^"]|"(?:[^"\\]|\\.)*")*+')


def _open_string(text: bytes) -> bytes:
    """Return a text that leaves a string open as ``text`` does; it is empty where none is open.

    JSON has no line breaks inside strings: one ends what looks like a string in raw text.
    """
    line = text[text.rfind(b"\n") + 1 :]
    settled = _SETTLED.match(line)
    begun = line[settled.end() :] if settled else line
    num_escapes = len(begun) - len(begun.rstrip(b"\\"))
    return b'"' + b"\\" * (num_escapes % 2) if begun else b""


class Place:
    """A place in an answer: the state of its grammar, and whether a string is open.

    Args:
        matcher: at this place; it moves on with it.
    """

    def __init__(self, matcher: GrammarMatcher, tokens: EndTokens, begun: bytes = b"") -> None:
        self.matcher = matcher
        self._tokens = tokens
        self._begun = begun

    @property
    def in_text(self) -> bool:
        """Return whether a string is open."""
        return bool(self._begun)

    def in_narrow_text(self, mask: NDArray[np.int32]) -> bool:
        """Return whether a string is open that, by the mask here, does not take any character."""
        is_whole = self.in_text and self._tokens.may_begin_character(mask)
        is_escaped = self._begun.endswith(b"\\")
        return is_whole and not is_escaped and not self._tokens.takes_any_text(mask)

    def accept(self, token_id: int) -> bool:
        """Move on by a token; False if the grammar does not allow it."""
        text = self._tokens.token_bytes(token_id)
        self._begun = _open_string(self._begun + text)
        return self.matcher.accept(token_id)

    def copy(self) -> Place:
        return Place(self.matcher.copy(), self._tokens, self._begun)

    def mask(self) -> NDArray[np.int32]:
        """Return the mask of the tokens that the grammar allows."""
        mask = np.zeros_like(self._tokens.ends)
        self.matcher.fill_mask(mask)
        return mask


class EndSearch:
    """Searches the ends of answers with one grammar.

    A search takes at most 2 * MAX_END masks, and at each at most 256 trials of texts that end a
    string.

    Args:
        matcher: before the first token.
        texts: of the grammar.

    Attributes:
        first: the end before the first token, which is the shortest answer; None for one of more
            than MAX_END tokens.
    """

    def __init__(self, matcher: GrammarMatcher, tokens: EndTokens, texts: EndTexts) -> None:
        self.tokens = tokens
        self._terminators = [
            [
                i
                for part in end
                for i in ([part] if isinstance(part, int) else tokens.tokenize(part))
            ]
            for end in texts.terminators
        ]
        ends = {text[at:] + b'"' for text in texts.of_strings for at in range(len(text))}
        ordered = sorted(ends, key=lambda text: (len(text), text))[:_MAX_TEXTS]
        self._string_ends = [tokens.tokenize(text) for text in ordered]
        self.first = self.end(self.place(matcher), MAX_END)

    def place(self, matcher: GrammarMatcher) -> Place:
        """Return the place before the first token; ``matcher`` moves on with it."""
        return Place(matcher, self.tokens)

    def _next(self, place: Place) -> list[int] | None:
        """Return tokens that lead to the end; None where the answer may end here, or cannot go on.

        They follow from the place alone, so that its end behind them is the rest of its end.
        """
        mask = place.mask()
        tokens = self.tokens
        if bool((mask & tokens.ends).any()):
            return None
        found = self._text(place, mask, self._terminators)
        if found is None and place.in_text and not (mask & tokens.ends_text).any():
            found = self._text(place, mask, self._string_ends)
        if found is not None:
            return found
        kinds = [
            *(tokens.closes, tokens.quotes, tokens.separates, tokens.is_plain),
            *(tokens.empties, tokens.opens, mask),
        ]
        if place.in_text:  # a bracket is text
            kinds = [tokens.ends_text, tokens.is_plain & ~tokens.closes, mask]
        for kind in kinds:
            token_id = tokens.longest(mask & kind)
            if token_id is not None:
                return self._up_to_the_end(place, mask, token_id)
        return None

    def _up_to_the_end(self, place: Place, mask: NDArray[np.int32], token_id: int) -> list[int]:
        """Return the token, or one that it begins with and behind which the answer may end."""
        text = self.tokens.token_bytes(token_id)
        for length in range(1, len(text)):
            shorter = self.tokens.tokenize(text[:length])
            is_token = len(shorter) == 1 and is_allowed(mask, shorter[0])
            if is_token and place.matcher.may_end_behind(shorter):
                return shorter
        return [token_id]

    @staticmethod
    def _text(place: Place, mask: NDArray[np.int32], texts: list[list[int]]) -> list[int] | None:
        """Return the first of some texts that may come at a place."""
        for token_ids in texts:
            if is_allowed(mask, token_ids[0]) and place.matcher.allows(token_ids):
                return token_ids
        return None

    def end(self, place: Place, limit: int) -> list[int] | None:
        """Return at most ``limit`` tokens that end the answer at ``place``, which stays as it is;
        None where it takes more or none are found.
        """
        at, found = place.copy(), list[int]()
        while len(found) <= min(2 * limit, MAX_END):
            token_ids = None if at.matcher.is_finished else self._next(at)
            if token_ids is None:
                found = found if len(found) < 2 else self._joined(place, found)
                return None if at.matcher.error or len(found) > limit else found
            if not all(at.accept(token_id) for token_id in token_ids):
                return None
            found.extend(token_ids)
        return None

    def _joined(self, place: Place, found: list[int]) -> list[int]:
        """Return the same text in fewer tokens where the tokenizer has a name and what follows it
        in one.
        """
        joined = self.tokens.tokenize(self.tokens.text(found))
        is_shorter = len(joined) < len(found)
        return joined if is_shorter and place.matcher.may_end_behind(joined) else found

    def end_like(self, place: Place, end: list[int], limit: int) -> tuple[list[int] | None, int]:
        """Return the end at a place that follows another one: sought until it goes on as the end
        before it does.

        Args:
            place: stays as it is.
            end: at the place before, or at one further back.
            limit: of tokens, and of masks.

        Returns:
            The tokens of the end, None where there is none within the limit; and the number of
            masks that were computed.
        """
        at, found, num_masks = place.copy(), list[int](), 0
        while len(found) <= limit:
            for num_same in range(min(len(end), limit - len(found)) + 1):
                rest = end[len(end) - num_same :]
                if at.matcher.may_end_behind(rest):
                    return found + rest, num_masks
            token_ids = None if num_masks >= limit else self._next(at)
            num_masks += 1
            if token_ids is None or not all(at.accept(token_id) for token_id in token_ids):
                break
            found += token_ids
        return None, num_masks
