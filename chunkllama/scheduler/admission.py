"""Admission by chunk-pool occupancy: what a sequence needs, what is promised to others already.

    need      = chunks to allocate (unshared tokens, one for a copy, spares) + decode reserve
    available = free + evictable, the sequence's own path excluded
    admit if need <= available - sum over running sequences of their unused reserve

A sequence gets the chunks of all its known tokens when it is admitted, so that what a running
sequence may still ask for is its decode reserve alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from chunkllama.cache.manager import CacheManager, Match, SequenceChunks
from chunkllama.errors import InvalidRequestError
from chunkllama.messages import EngineRequest
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence

FIRST_EXPECTED_TOKENS: Final = 256  # before any request has finished
LENGTH_WINDOW: Final = 512  # finished outputs in the quantile
DRAIN_WINDOW: Final = 64  # releases in the drain rate
MAX_RETRY_AFTER: Final = 30
DEFAULT_RETRY_AFTER: Final = 5  # nothing has finished yet


class OutputLengths:
    """Running quantile over the lengths of the outputs that finished last.

    Attributes:
        expected: the quantile.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self.expected = FIRST_EXPECTED_TOKENS

    def add(self, length: int) -> None:
        self._recent.append(length)
        insort(self._sorted, length)
        if len(self._recent) > LENGTH_WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        last = len(self._sorted) - 1
        self.expected = self._sorted[min(last, int(self._quantile * len(self._sorted)))]


class DrainRate:
    """Rate at which finishing sequences free chunks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._releases: deque[tuple[float, int]] = deque(maxlen=DRAIN_WINDOW)

    def add(self, num_chunks: int) -> None:
        self._releases.append((self._clock(), num_chunks))

    def seconds_for(self, num_chunks: int) -> int:
        """Whole seconds until that many chunks will be free, in [1, 30]."""
        if not self._releases:
            return DEFAULT_RETRY_AFTER
        elapsed = self._clock() - self._releases[0][0]
        released = sum(count for _, count in self._releases)
        seconds = math.ceil(num_chunks * elapsed / max(released, 1))
        return min(max(seconds, 1), MAX_RETRY_AFTER)


def longest_request(max_model_len: int, pool_tokens: int) -> int:
    """Prompt and output tokens that one request may have; the last token needs no K/V."""
    return min(max_model_len, pool_tokens + 1)


class AdmissionControl:
    """Decides who may start and with how many chunks; refuses what could never run."""

    def __init__(
        self, limits: SchedulerLimits, cache: CacheManager, clock: Callable[[], float]
    ) -> None:
        self.lengths = OutputLengths(limits.reserve_quantile)
        self.drain = DrainRate(clock)
        self._limits = limits
        self._cache = cache

    def num_chunks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._cache.chunk_size)

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens of the longest request."""
        pool = self._cache.num_chunks * self._cache.chunk_size
        return longest_request(self._limits.max_model_len, pool)

    def resolve_max_tokens(self, request: EngineRequest) -> int:
        """Output tokens of each choice; with max_tokens null what fits alone.

        Raises:
            InvalidRequestError: the prompt, or the prompt with an explicit max_tokens, is longer
                than the context or the pool; beams that cannot all be in the pool.
        """
        num_prompt = len(request.prompt_token_ids)
        wanted = 0 if request.wants_hidden_states else request.sampling.max_tokens
        limit = self.max_request_tokens
        least = 0 if wanted == 0 else 1
        if wanted == 0:
            limit = min(limit, self._cache.num_chunks * self._cache.chunk_size)
        if num_prompt + least > limit:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens, at most {limit - least} fit "
                f"({self._what_limits()})",
                "prompt",
                "context_length_exceeded",
            )
        max_tokens = limit - num_prompt if wanted is None else wanted
        if num_prompt + max_tokens > limit:
            raise InvalidRequestError(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} are "
                f"{num_prompt + max_tokens} tokens, at most {limit} fit ({self._what_limits()})",
                "max_tokens",
                "context_length_exceeded",
            )
        width = request.sampling.beam_width
        if width > 1:
            max_tokens = self._beam_tokens(request, max_tokens)
        return max_tokens

    def _beam_tokens(self, request: EngineRequest, max_tokens: int) -> int:
        """Limit the tokens of beams, which run together and share the prompt's whole chunks."""
        width, explicit = request.sampling.beam_width, request.sampling.max_tokens
        size, num_prompt = self._cache.chunk_size, len(request.prompt_token_ids)
        whole = self._num_shown_chunks(request)
        each = (self._cache.num_chunks - whole) // width
        fits = (whole + each) * size - num_prompt + 1
        if fits < (1 if explicit is None else explicit):
            raise InvalidRequestError(
                f"{width} beams of {num_prompt} prompt tokens and max_tokens {max_tokens} do not "
                f"fit the pool, at most {max(fits, 0)} output tokens each do",
                "max_tokens",
                "context_length_exceeded",
            )
        return min(max_tokens, fits)

    def _num_shown_chunks(self, request: EngineRequest) -> int:
        """Whole prompt chunks that sequences of one request share."""
        if not self._limits.enable_prefix_caching:
            return 0
        num_prompt, until = len(request.prompt_token_ids), request.cache_until
        return (num_prompt if until is None else min(until, num_prompt)) // self._cache.chunk_size

    def _what_limits(self) -> str:
        pool = self._cache.num_chunks * self._cache.chunk_size
        return f"context {self._limits.max_model_len} tokens, K/V pool {pool} tokens"

    def expected_chunks(self, sequence: Sequence) -> int:
        """Chunks the sequence will probably hold in the end."""
        expected = sequence.num_prompt_tokens + self.lengths.expected - 1
        tokens = max(sequence.num_tokens, min(sequence.max_kv_tokens, expected))
        return self.num_chunks(tokens)

    def spare_chunks(self, sequence: Sequence, num_chunks: int) -> int:
        """Spares beyond ``num_chunks``; none that the sequence could never use."""
        most = self.num_chunks(max(sequence.max_kv_tokens, sequence.num_tokens))
        return max(0, min(self._limits.spare_chunks, most - num_chunks))

    def reserved(self, running: Iterable[Sequence]) -> int:
        """Chunks promised to running sequences and not allocated yet."""
        total, size = 0, self._cache.chunk_size
        output = self.lengths.expected - 1
        for sequence in running:
            assert sequence.chunks is not None
            group = sequence.group
            more = group.max_tokens - 1  # as expected_chunks, but faster
            if more > output:
                more = output
            tokens = sequence.num_prompt_tokens + more
            if tokens < sequence.num_tokens:
                tokens = sequence.num_tokens
            unused = -(-tokens // size) - len(sequence.chunks.ids)
            if unused > 0:
                total += unused
            if group.beam is not None:
                total += self._beam_chunks(sequence)
        return total

    def _beam_chunks(self, sequence: Sequence) -> int:
        """Chunks of the beams that are still to be forked from the sequence."""
        beam = sequence.group.beam
        if beam is None or beam.is_expanded:
            return 0
        shown = self._num_shown_chunks(sequence.group.request)
        return (beam.width - 1) * (self.num_chunks(sequence.max_kv_tokens) - shown)

    def num_needed(self, sequence: Sequence, match: Match) -> int:
        """Chunks that the sequence will probably need beside those of the match."""
        needed = self.expected_chunks(sequence) + self._beam_chunks(sequence)
        return max(needed - len(match.nodes), 0)

    def admit(
        self, sequence: Sequence, match: Match, promised: int
    ) -> tuple[SequenceChunks, Match] | None:
        """Chunks for a sequence that may start and what it takes of ``match``, else None.

        Args:
            promised: ``reserved`` of the running sequences.
        """
        num_chunks = self.num_chunks(sequence.num_tokens)
        num_chunks += self.spare_chunks(sequence, num_chunks)
        reserve = max(0, self.expected_chunks(sequence) - num_chunks)
        group = sequence.group
        if group.beam is not None:
            reserve += self._beam_chunks(sequence)
        insert_limit = group.insert_limit if self._limits.enable_prefix_caching else 0
        namespace = group.request.namespace
        for admission in self._cache.admissions(match, num_chunks, namespace):
            if admission.num_new + reserve <= admission.available - promised:
                chunks = self._cache.admit(
                    admission, sequence.cache_key, namespace, insert_limit, sequence.tenant
                )
                return chunks, admission.match
        return None
