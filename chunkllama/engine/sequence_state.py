"""What the executor keeps per sequence slot between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.engine.grammar import TOO_COMPLEX, Matcher, is_beyond_limits
from chunkllama.engine.token_masks import forbid, is_allowed, mask_of
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.sampling_params import SamplingParams

logger = init_logger(__name__)


class AllowedTokens:
    """``allowed_token_ids`` of a request: its choices, and their rows behind guesses, share the
    mask."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._mask: NDArray[np.int32] | None = None

    def mask(self, num_words: int) -> NDArray[np.int32]:
        """Mask [num_words] of those tokens that fit in it, made once and read-only."""
        if self._mask is None:
            ids = np.array(self._token_ids, np.int64)
            self._mask = mask_of(ids[(ids >= 0) & (ids < 32 * num_words)], num_words)
            self._mask.flags.writeable = False
        return self._mask


@dataclass(slots=True)
class SequenceState:
    """One sequence: its parameters and history.

    Attributes:
        index: of the choice within its request; part of the random numbers' counter.
        request_id: whose choice it is.
        matcher: the grammar's state after ``output_token_ids``; None without a grammar, while
            ``pending_matcher`` is being made, or before the first mask.
        new_matcher: makes the matcher for the first mask; None without a grammar, or where the
            matcher is made in advance.
        mask: of the tokens that may come next, once ``mask_task`` has computed it.
        drafts: guesses at the next tokens, which this step's rows check.
        draft_masks: of the tokens that may come after the first guess, the first two, ..., as far
            as the grammar allows those.
        mask_seconds, slowest_mask: what the last mask took, and about the slowest of the last ones.
        failed: why this sequence can sample no more, "" while it can.
        pooled: [H] float64 sum (mean pooling) or last hidden state, over the rows seen so far.
        hidden: [H] final hidden state of a row that is sampled in a later step.
        adapter: that it uses; None is the base model.
        allowed: the request's ``allowed_token_ids``, made here unless given; None without any.
    """

    sampling: SamplingParams
    index: int
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: list[int]
    request_id: str = ""
    pooling: str = ""
    matcher: Matcher | None = None
    pending_matcher: Future[Matcher] | None = None
    new_matcher: Callable[[], Matcher] | None = field(default=None, repr=False)
    mask: NDArray[np.int32] | None = field(default=None, repr=False)
    mask_task: Future[None] | None = field(default=None, repr=False)
    drafts: list[int] = field(default_factory=list)
    draft_masks: list[NDArray[np.int32]] = field(default_factory=list, repr=False)
    mask_seconds: float = 0.0
    slowest_mask: float = 0.0
    failed: str = ""
    pooled: torch.Tensor | None = field(default=None, repr=False)
    hidden: torch.Tensor | None = field(default=None, repr=False)
    adapter: AdapterUse | None = None
    allowed: AllowedTokens | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.allowed is None and self.sampling.allowed_token_ids:
            self.allowed = AllowedTokens(self.sampling.allowed_token_ids)

    def allowed_mask(self, num_words: int) -> NDArray[np.int32] | None:
        """Mask [num_words] of the tokens that the request allows; None where it allows all."""
        return None if self.allowed is None else self.allowed.mask(num_words)

    def banned_ids(self, eos_token_ids: Iterable[int]) -> Iterator[int]:
        """Yield the tokens that ``min_tokens`` and ``bad_words`` forbid as the next.

        Args:
            eos_token_ids: of the model, which ``min_tokens`` forbids as the request's own.
        """
        sampling, output = self.sampling, self.output_token_ids
        if len(output) < sampling.min_tokens:
            yield from sampling.stop_token_ids
            if not sampling.ignore_eos:
                yield from eos_token_ids
        for *start, last in sampling.bad_words_token_ids:
            if not start or output[-len(start) :] == start:
                yield last

    def leaves_any(self, mask: NDArray[np.int32], eos_token_ids: Iterable[int]) -> bool:
        """Return whether the parameters allow a token of a grammar's mask [ceil(vocab / 32)]."""
        banned, allowed = [*self.banned_ids(eos_token_ids)], self.allowed_mask(len(mask))
        left = mask.copy() if allowed is None else mask & allowed
        for token_id in banned:
            if is_allowed(left, token_id):
                forbid(left, token_id)
        return bool(left.any())

    @property
    def is_ready(self) -> bool:
        """Whether the next token can be drawn: its mask is there, or none is needed."""
        needs_mask = self.matcher or self.pending_matcher or self.new_matcher
        return bool(self.failed) or needs_mask is None or self.mask is not None

    @property
    def num_rows(self) -> int:
        """Rows of this step that can yield a token: with a grammar, those that have a mask."""
        drafts, masks = len(self.drafts), len(self.draft_masks)
        return 1 + (drafts if self.mask is None else min(drafts, masks))

    def after_drafts(self, count: int) -> SequenceState:
        """The sequence as it is if its first ``count`` guesses are right, to sample what follows.

        It has no matcher; the mask is that of the row.
        """
        state = copy(self)
        state.output_token_ids = self.output_token_ids + self.drafts[:count]
        state.matcher, state.mask_seconds = None, 0.0
        state.mask = None if self.mask is None else self.draft_masks[count - 1]
        return state

    def drop_drafts(self) -> None:
        """Forget the guesses, which have been checked or never will be."""
        self.drafts, self.draft_masks = [], []

    def append(self, token_id: int) -> None:
        """Add a sampled token; the grammar moves on with it."""
        self.output_token_ids.append(token_id)
        self.mask = self.mask_task = None
        if self.matcher is None:
            return
        with self.using_grammar():
            if not self.matcher.accept(token_id):
                # The mask that allowed the token may have been left incomplete.
                is_beyond = is_beyond_limits(self.matcher.error)
                self.failed = TOO_COMPLEX if is_beyond else "grammar_error"

    @contextmanager
    def using_grammar(self) -> Iterator[None]:
        """Make an error of the grammar, inside, fail this request alone.

        The grammar library reports a failed assertion as an exception that is no Exception.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.fail_grammar(error)

    def fail_grammar(self, error: BaseException) -> None:
        """Let the sequence sample no more, because of an error of its grammar."""
        self.failed = "grammar_error"
        if isinstance(error, (InvalidRequestError, ConfigError)):
            logger.warning("request %s: %s", self.request_id, error)
        else:
            logger.error("request %s: its grammar failed", self.request_id, exc_info=error)
