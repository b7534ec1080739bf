"""Thoughts before an answer with a grammar, as token masks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.token_masks import allow, forbid
from chunkllama.sampling_params import ThinkingSpec

if TYPE_CHECKING:
    from chunkllama.engine.closing import ClosingMatcher
    from chunkllama.engine.grammar import GrammarMatcher


class ThinkingMatcher:
    """Thoughts of free text up to their budget, then a grammar or free text.

    They end in time for the shortest answer, where its grammar counts the tokens that are left.

    Args:
        answer: what the answer obeys; None for free text.
        token_bytes: the bytes of one token.
        eos_token_ids: forbidden in thoughts that an answer with a grammar follows.
    """

    def __init__(
        self,
        spec: ThinkingSpec,
        answer: GrammarMatcher | ClosingMatcher | None,
        token_bytes: Callable[[int], bytes],
        eos_token_ids: list[int],
    ) -> None:
        self._spec = spec
        self._answer = answer
        self._token_bytes = token_bytes
        self._eos_token_ids = eos_token_ids
        self._end = spec.end.encode()
        self._is_thinking = spec.is_open
        self._num_tokens = 0
        # Of the ending tag that is being forced.
        self._num_forced = 0
        self._tail = b""

    @property
    def _may_begin(self) -> bool:
        return not self._is_thinking and self._num_tokens == 0

    @property
    def _must_end(self) -> bool:
        budget, answer = self._spec.budget, self._answer
        if not self._is_thinking:
            return False
        if self._num_forced or (budget is not None and self._num_tokens >= budget):
            return True
        # One token more would leave no room for the end of the thoughts and an answer.
        return answer is not None and not answer.has_room(1 + len(self._spec.end_token_ids))

    def fill_mask(self, mask: NDArray[np.int32], *, whole: bool = False) -> None:
        if self._must_end:
            allow(mask, self._spec.end_token_ids[self._num_forced])
        elif self._is_thinking or self._answer is None:
            mask.fill(-1)
            if self._answer is not None:
                for token in self._eos_token_ids:
                    forbid(mask, token)
        else:
            self._answer.fill_mask(mask, whole=whole)
            # Thoughts that leave no room for the end of the answer do not begin.
            may_begin = self._may_begin and self._answer.has_room(1 + len(self._spec.end_token_ids))
            if may_begin and self._spec.start_token_id is not None:
                allow(mask, self._spec.start_token_id)

    @property
    def error(self) -> str:
        return "" if self._is_thinking or self._answer is None else self._answer.error

    def accept(self, token_id: int) -> bool:
        may_begin, must_end = self._may_begin, self._must_end
        self._num_tokens += 1
        if self._is_thinking or (may_begin and token_id == self._spec.start_token_id):
            if self._answer is not None:
                self._answer.spend()
            if self._is_thinking:
                self._think(token_id, must_end)
            self._is_thinking |= may_begin
            return True
        return self._answer is None or self._answer.accept(token_id)

    def _think(self, token_id: int, must_end: bool) -> None:
        if must_end:
            self._num_forced += 1
            self._is_thinking = self._num_forced < len(self._spec.end_token_ids)
            return
        self._tail += self._token_bytes(token_id)
        is_end = self._spec.end_token_ids == (token_id,) or self._end in self._tail
        self._tail = self._tail[-len(self._end) :]
        self._is_thinking = not is_end

    @property
    def is_finished(self) -> bool:
        return not self._is_thinking and self._answer is not None and self._answer.is_finished

    @property
    def is_closing(self) -> bool:
        return self._answer is not None and self._answer.is_closing

    def copy(self) -> ThinkingMatcher:
        other = copy(self)
        other._answer = None if self._answer is None else self._answer.copy()
        return other

    def forced(self) -> list[int]:
        if self._must_end:
            return list(self._spec.end_token_ids[self._num_forced :])
        if self._is_thinking or self._answer is None or self._may_begin:
            return []
        return self._answer.forced()
