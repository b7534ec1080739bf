"""Close an answer in JSON before its tokens run out: what is cut inside an object is of no use.

A weak model repeats the members of a list as often as its grammar allows, and no bound of a schema
that leaves room for good answers ends all bad ones in time. So a short end is kept up to date while
the last tokens are written, and a token is allowed only if an end fits behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.end_search import MAX_END, EndSearch, Place
from chunkllama.engine.token_masks import allow, is_allowed, mask_of, token_ids_of

if TYPE_CHECKING:
    from chunkllama.engine.grammar import GrammarMatcher

# With this many tokens to spare, or fewer, the end behind each group of tokens is sought at every
# mask. With more, it is sought once for masks and ends that are the same, and only what takes more
# than this is remembered: the record that a bracket opens, or a member that a name begins.
_RESERVE = 32
# Of the answer's last tokens, so many are looked at: an end may take MAX_END, and as many more may
# be taken by what a token opens.
_NUM_LOOKS = 2 * MAX_END
# Where no end was found, it is sought again after so many tokens, and at each of the last ones.
_RETRY_STEP = 32
# In a string that does not take any character, the end behind a token may be longer than behind
# another one of its group by about so many tokens, which are kept free for it.
_DIFFERENCE = 16
# Groups that are tried at one mask, and masks that this takes.
_MAX_TRIALS = 1024
# What goes on with no more tokens than this may still be the text of the end.
_FEW_TOKENS = 16


class ClosingMatcher:
    """A grammar of JSON that allows near the limit only tokens behind which its end fits.

    What it allows follows from the tokens so far, so that a sequence which is computed again closes
    in the same place. It looks where a mask is filled, which the step loop does not wait for; what
    was accepted without a mask is looked at then.

    A mask takes at most 4 * MAX_END masks of the grammar for the end, and _MAX_TRIALS for the
    tokens to be tried, beside copies of its state.

    Args:
        matcher: before the first token.
        num_tokens: that the output may have.
        search: of the grammar.
    """

    def __init__(self, matcher: GrammarMatcher, num_tokens: int, search: EndSearch) -> None:
        self._place = search.place(matcher)
        self._num_left = num_tokens
        self._search = search
        # By the tokens left: the last place that was looked at. The end there, and the mask if only
        # the end was left of it.
        self._looked_at: int | None = None
        self._end: list[int] | None = None
        self._closed: NDArray[np.int32] | None = None
        self._is_closing = False
        # The place behind the last look, and the tokens since, if it was left without a look.
        self._behind: Place | None = None
        self._unseen: tuple[int, ...] = ()
        # By the mask and the end: tokens that need many more, with their need.
        self._needs: dict[tuple[int, tuple[int, ...]], list[tuple[int, NDArray[np.int32]]]] = {}

    @property
    def is_closing(self) -> bool:
        """Return whether a token was written because only the end of the answer still fitted."""
        self.catch_up()
        return self._is_closing

    def spend(self) -> None:
        """Count a token that the grammar does not see, before the first that it sees."""
        self._num_left -= 1
        self._looked_at = self._end = None

    def has_room(self, num_tokens: int) -> bool:
        """Return whether so many tokens fit before the shortest answer."""
        first = self._search.first
        return first is None or self._num_left >= num_tokens + len(first)

    def fill_mask(self, mask: NDArray[np.int32], *, whole: bool = False) -> None:
        self._place.matcher.fill_mask(mask)
        if whole or self._num_left > _NUM_LOOKS or self.error or self.is_finished:
            return
        self.catch_up()
        self._look(self._place, self._num_left, mask)

    def catch_up(self) -> None:
        """Look at the places that were left without a mask."""
        at, self._behind = self._behind, None
        num_left = self._num_left + len(self._unseen)
        for token_id in self._unseen:
            assert at is not None, "tokens without the place before them"
            if not at.matcher.is_finished:
                self._look(at, num_left, at.mask())
            self._leave(token_id)
            at.accept(token_id)
            num_left -= 1
        self._unseen = ()

    def _look(self, place: Place, num_left: int, mask: NDArray[np.int32]) -> None:
        """Find the end at a place, and remove the tokens from its mask behind which none fits."""
        if self._looked_at != num_left:
            self._end = self._find_end(place, num_left)
        self._looked_at, self._closed = num_left, None
        end = self._end
        if end is None or num_left - len(end) > MAX_END:
            return
        kept = self._kept(place, num_left - 1, mask, end)
        if bool((mask != kept).any()) and self._only_ends(kept, end):
            self._closed = kept
        mask[:] = kept

    def _find_end(self, place: Place, num_left: int) -> list[int] | None:
        search, last = self._search, self._end
        limit, end = min(num_left, MAX_END), None
        if last is not None:
            end, _ = search.end_like(place, last, limit)
        is_due = self._looked_at is None or last is not None or num_left % _RETRY_STEP == 0
        is_due |= num_left <= _RETRY_STEP
        is_near = end is not None and num_left - len(end) <= _RESERVE
        if is_near or (end is None and is_due):
            other = search.end(place, limit)
            if end is None or (other is not None and len(other) < len(end)):
                end = other
        return end

    def _kept(
        self, place: Place, left: int, mask: NDArray[np.int32], end: list[int]
    ) -> NDArray[np.int32]:
        """Return the tokens of a mask behind which an end of at most ``left`` tokens fits."""
        tokens = self._search.tokens
        first = tokens.ends.copy()
        if end:
            allow(first, end[0])
        others = mask & ~first
        if len(end) > left:
            return mask & first
        if left - len(end) < _RESERVE:
            kept = mask & first
            differ = place.in_narrow_text(mask)
            for group, need in self._tried(place, others, end, left):
                spare = _DIFFERENCE if differ and len(group) > 1 else 0
                if need is not None and need + spare <= left:
                    kept |= mask_of(group, len(mask))
            return kept
        key = (hash(mask.tobytes()), tuple(end))
        if key not in self._needs:
            self._needs[key] = [
                (MAX_END + 1 if need is None else need, mask_of(group, len(mask)))
                for group, need in self._tried(place, others, end, min(left, MAX_END))
                if need is None or need > len(end) + _RESERVE
            ]
        for need, members in self._needs[key]:
            if need > left:
                others &= ~members
        return (mask & first) | others

    def _tried(
        self, place: Place, mask: NDArray[np.int32], end: list[int], limit: int
    ) -> Iterator[tuple[NDArray[np.int64], int | None]]:
        """Yield the groups of tokens of a mask that can be tried, with the length of the end behind
        each; None where there is none within the limit.
        """
        budget = _MAX_TRIALS
        for group in self._search.tokens.groups(mask, in_text=place.in_text):
            behind, found, num_masks = place.copy(), None, 0
            if behind.accept(int(group[0])):
                found, num_masks = self._search.end_like(behind, end, min(limit, budget))
            if found is None and budget < limit:
                return
            yield group, None if found is None else len(found)
            budget -= 1 + num_masks

    def _only_ends(self, mask: NDArray[np.int32], end: list[int]) -> bool:
        """Return whether the tokens of a mask end the answer, or begin with the text of the end."""
        tokens = self._search.tokens
        text, token_ids = tokens.text(end), token_ids_of(mask & ~tokens.ends).tolist()
        return len(token_ids) <= _FEW_TOKENS and all(
            text.startswith(tokens.text([token_id]).strip()) for token_id in token_ids
        )

    def _leave(self, token_id: int) -> None:
        """Note the token behind the last look."""
        self._is_closing |= self._closed is not None and is_allowed(self._closed, token_id)

    @property
    def error(self) -> str:
        return self._place.matcher.error

    def accept(self, token_id: int) -> bool:
        if self._behind is None and self._looked_at == self._num_left:
            self._leave(token_id)
        elif self._num_left <= _NUM_LOOKS:
            if self._behind is None:
                self._behind = self._place.copy()
            self._unseen += (token_id,)
        self._num_left -= 1
        return self._place.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return self._place.matcher.is_finished

    def copy(self) -> ClosingMatcher:
        other = copy(self)
        other._place = self._place.copy()
        other._behind = None if self._behind is None else self._behind.copy()
        other._needs = dict(self._needs)
        return other

    def forced(self) -> list[int]:
        return self._place.matcher.forced()
