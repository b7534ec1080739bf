"""What is kept of a live request so that another engine process can continue it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from chunkllama.cache_messages import EndedPin
from chunkllama.errors import EngineDeadError
from chunkllama.messages import AbortRequest, EngineRequest, ToEngine, TokenDelta


@dataclass(slots=True)
class ReplayState:
    """A request and what its client has of it.

    Attributes:
        request: with its seed, so that the rest is drawn with the same random numbers.
        delivered: output tokens per choice.
        ended: choices that have ended, by themselves or aborted.
        first: the first delta; what it said of the prompt holds for the whole request.
        submitted: the engine process of now has the request.
        pin_ended: an operator has ended the pin that the request had asked for.
        crashes: engine processes in a row that ended in a step with this request, which had
            gained no token since the one before.
    """

    request: EngineRequest
    clock: Callable[[], float] = time.monotonic
    delivered: list[list[int]] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    first: TokenDelta | None = None
    submitted: bool = False
    pin_ended: bool = False
    crashes: int = 0
    gained: bool = False
    _arrived_at: float = 0.0
    _submitted_at: float = 0.0
    _first_at: float = 0.0
    _has_prompt_logprobs: bool = False
    _was_submitted: bool = False
    _is_replay: bool = False

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        is_beam_search = sampling.beam_width > 1
        count = sampling.n if is_beam_search else sampling.num_sequences
        self.delivered = [[] for _ in range(count)]
        self._arrived_at = self._submitted_at = self.clock()

    @property
    def is_live(self) -> bool:
        """Some choice has not ended."""
        return len(self.ended) < len(self.delivered)

    def record(self, delta: TokenDelta) -> None:
        """Record what the client gets; after a replay, correct the past tokens of the delta."""
        if delta.error is not None:
            self.ended = set(range(len(self.delivered)))
            return
        if self.first is None:  # it may have waited for the engine's restart
            delta.queue_seconds += self._submitted_at - self._arrived_at
        elif self._is_replay:
            self._repair(delta, self.first)
        for choice in delta.choices:
            self.delivered[choice.index] += choice.token_ids
            self.gained |= bool(choice.token_ids)
            if choice.finish_reason is not None:
                self.ended.add(choice.index)
        self._has_prompt_logprobs |= delta.prompt_logprobs is not None
        if self.first is None:
            self.first, self._first_at = delta, self.clock()

    def _repair(self, delta: TokenDelta, first: TokenDelta) -> None:
        delta.num_cached_tokens = first.num_cached_tokens
        delta.num_rounded_tokens = first.num_rounded_tokens
        delta.num_cache_write_tokens = first.num_cache_write_tokens
        delta.pin_refused = first.pin_refused
        delta.explanation = None  # the caller has the first one
        delta.queue_seconds = first.queue_seconds
        delta.prefill_seconds = first.prefill_seconds
        delta.decode_seconds = first.decode_seconds + self.clock() - self._first_at

    def count_crash(self) -> None:
        """An engine process has ended in a step with this request."""
        self.crashes = 1 if self.gained else self.crashes + 1
        self.gained = False

    def submission(self) -> list[ToEngine]:
        """The messages that start the request, or continue it in another engine process."""
        self.submitted = True
        self._submitted_at = self.clock()
        if not self._was_submitted:
            self._was_submitted = True
            return [self.request]
        self._is_replay = True
        request, sampling = self.request, self.request.sampling
        if self._has_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        delivered = [] if sampling.beam_width > 1 else [list(ids) for ids in self.delivered]
        again = msgspec.structs.replace(
            request,
            sampling=sampling,
            delivered=delivered,
            pin_seconds=self.pin_seconds_left(),
            is_replay=True,
        )
        aborts = [AbortRequest(request_id=request.request_id, index=index) for index in self.ended]
        return [again, *aborts]

    def pin_seconds_left(self) -> float:
        """Of the pin's least lifetime, what remains; 0 is no pin."""
        if self.first is None:
            return self.request.pin_seconds
        if self.first.pin_refused or self.pin_ended:
            return 0.0
        return max(self.request.pin_seconds - (self.clock() - self._first_at), 0.0)

    def end_pin(self, pin: EndedPin) -> None:
        """Note a pin that an operator has ended, if it is the one of this request."""
        if self.first is not None and self.request.tenant == pin.tenant:
            prompt = self.request.prompt_token_ids[: self.request.cache_until]
            request = self.request
            self.pin_ended |= is_pin_of(pin, request.namespace, request.adapter, prompt)


@dataclass(slots=True, eq=False)
class Stream:
    """A request that is being answered.

    Attributes:
        unfinished: choices that have not ended.
        backlog: tokens and log-probability entries that wait in ``inbox``.
    """

    state: ReplayState
    inbox: asyncio.Queue[TokenDelta | EngineDeadError]
    unfinished: set[int]
    is_beam_search: bool
    backlog: int = 0
    overflowed: bool = False


def num_entries(delta: TokenDelta) -> int:
    """What a delta adds to a stream's backlog."""
    if len(delta.choices) == 1 and delta.choices[0].logprobs is None:
        return len(delta.choices[0].token_ids)
    return sum(
        len(choice.token_ids)
        if choice.logprobs is None
        else sum(1 + len(entry.top) for entry in choice.logprobs)
        for choice in delta.choices
    )


def is_pin_of(pin: EndedPin, namespace: str, adapter: str, prompt: Sequence[int]) -> bool:
    """Whether a prompt of the pin's tenant was pinned by ``pin``, perhaps with others."""
    shorter = min(len(prompt), len(pin.token_ids))
    return (
        (len(prompt), adapter) in pin.askers
        and pin.namespace in ("", namespace)
        and list(prompt[:shorter]) == pin.token_ids[:shorter]
    )
