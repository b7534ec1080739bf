"""Compute grammar masks in threads while the model runs. A step waits for none longer than it
says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.grammar import Matcher
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.resources import lower_priority

# A mask that took longer is computed beside the others the next time, so that none waits for it.
SLOW_SECONDS: Final = 0.002
_DECAY: Final = 0.9


class MaskThreads:
    """Two threads: one for masks that are quick, as all ordinary ones are, one for the rest.

    Args:
        vocab_size: of the model.
        eos_token_ids: of the model, which ``min_tokens`` forbids.
        clock: seconds.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._words = -(-vocab_size // 32)
        self._eos_token_ids = tuple(eos_token_ids)
        self._clock = clock
        self._quick_task: Future[None] | None = None  # of the last start's quick masks
        self._quick = ThreadPoolExecutor(1, thread_name_prefix="grammar-mask")
        self._slow = ThreadPoolExecutor(1, "grammar-slow-mask", lower_priority)

    def start(self, states: Iterable[SequenceState]) -> None:
        """Compute the masks of the next tokens that are not there yet nor being computed."""
        missing = [
            s
            for s in states
            if (s.matcher or s.new_matcher)
            and not s.failed
            and s.mask is None
            and s.mask_task is None
        ]
        quick = [s for s in missing if s.slowest_mask <= SLOW_SECONDS]
        self._quick_task = self._submit(self._quick, quick) if quick else None
        for state in missing:
            if state.slowest_mask > SLOW_SECONDS:
                self._submit(self._slow, [state])

    def _submit(self, pool: ThreadPoolExecutor, states: list[SequenceState]) -> Future[None]:
        task = pool.submit(self._compute, states)
        for state in states:
            state.mask_task = task
        return task

    def _compute(self, states: list[SequenceState]) -> None:
        for state in states:
            with state.using_grammar():
                self._compute_one(state)

    def _compute_one(self, state: SequenceState) -> None:
        started = made = self._clock()
        if state.matcher is None:
            assert state.new_matcher is not None, "no grammar"
            state.matcher = state.new_matcher()
            made = self._clock()
        mask = self._mask(state.matcher, state)
        ended = self._clock()
        state.mask_seconds = ended - started
        state.slowest_mask = max(ended - made, _DECAY * state.slowest_mask)
        if state.drafts and state.slowest_mask <= SLOW_SECONDS:
            self._compute_after_drafts(state, state.matcher)
            state.mask_seconds = self._clock() - started
        state.mask = mask  # last, because the step loop looks at it

    def _compute_after_drafts(self, state: SequenceState, matcher: Matcher) -> None:
        """Compute the masks behind each guess, up to one that the grammar does not allow."""
        after = matcher.copy()
        for count, token_id in enumerate(state.drafts, 1):
            if not after.accept(token_id) or after.is_finished:
                break
            state.draft_masks.append(self._mask(after, state.after_drafts(count)))

    def _mask(self, matcher: Matcher, state: SequenceState) -> NDArray[np.int32]:
        """Return the mask of a grammar: the whole one if the request's parameters forbid all tokens
        behind which an end fits.
        """
        mask = np.zeros(self._words, np.int32)
        matcher.fill_mask(mask)
        if not state.leaves_any(mask, self._eos_token_ids):
            mask.fill(0)
            matcher.fill_mask(mask, whole=True)
        return mask

    def wait(self, seconds: float) -> None:
        """Wait at most this long for the quick masks that the last ``start`` has begun.

        What an earlier one began is slow, though no measurement says so yet. A sequence whose
        grammar raised an error has failed instead of having a mask.
        """
        if self._quick_task is not None:
            wait({self._quick_task}, seconds)

    def wait_for_all(self, states: Iterable[SequenceState]) -> None:
        """Wait for the masks of ``states`` that are being computed, however long they take."""
        tasks = {s.mask_task for s in states if s.mask is None and s.mask_task is not None}
        if tasks:
            wait(tasks)

    def close(self) -> None:
        self._quick.shutdown(wait=True, cancel_futures=True)
        self._slow.shutdown(wait=True, cancel_futures=True)
