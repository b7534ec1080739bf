"""Prompts whose pins outlive their requests, so that another engine process pins them again."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import time
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Final

from chunkllama.cache_messages import EndedPin
from chunkllama.engine.replay import ReplayState, is_pin_of
from chunkllama.logger import init_logger
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

MAX_TOKENS: Final = 2**24  # of all records, 4 bytes each

logger = init_logger(__name__)


class _Record:
    """What pins a prompt again.

    Attributes:
        tokens: the pinned part of the prompt; with an adapter the prompt as a whole, as tokens
            behind the pinned part may decide from where on the adapter is active.
        num_pinned: tokens of the pinned part.
        begin: tokens before the chunk in which the pinned part ends.
        until: when the pin ends, by the clock of ``PinRecords``.
        is_kept: it has not been removed.
    """

    __slots__ = ("begin", "is_kept", "num_pinned", "owner", "tokens", "until")

    def __init__(
        self,
        owner: tuple[str, str, str],
        tokens: list[int],
        num_pinned: int,
        until: float,
        chunk_size: int,
    ) -> None:
        self.owner = owner  # namespace, tenant, adapter
        self.tokens = array("i", tokens)
        self.num_pinned = num_pinned
        self.begin = (num_pinned - 1) // chunk_size * chunk_size
        self.until = until
        self.is_kept = True

    @property
    def pinned(self) -> array[int]:
        return self.tokens[: self.num_pinned]

    @property
    def tail(self) -> array[int]:
        """Tokens of the pinned part in its last chunk."""
        return self.tokens[self.begin : self.num_pinned]

    @property
    def key(self) -> bytes:
        """Digest of the owner and of what precedes the last chunk."""
        digest = hashlib.blake2b(repr(self.owner).encode(), digest_size=16)
        digest.update(self.tokens[: self.begin].tobytes())
        return digest.digest()


def _tail(record: _Record) -> array[int]:
    return record.tail


class PinRecords:
    """Pins of requests that have ended.

    A pin protects the chunk in which its prompt ends. Of prompts that end in the same chunk and
    begin one another the longest is kept, so there are as many records as chunks in which a pinned
    prompt ends, which the pin budget bounds. Beyond ``max_tokens`` those that end first are
    dropped. Adding one costs the length of its prompt, however many there are.

    Args:
        chunk_size: tokens of a chunk.
        clock: monotonic seconds.
        max_tokens: of all prompts.
    """

    def __init__(
        self,
        chunk_size: int,
        clock: Callable[[], float] = time.monotonic,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self._chunk_size = chunk_size
        self._clock = clock
        self._max_tokens = max_tokens
        self._num_tokens = 0
        # By ``key``, sorted by ``tail``: a record that begins another one would precede it.
        self._records: dict[bytes, list[_Record]] = {}
        self._ends: list[tuple[float, int, _Record]] = []  # a heap
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._records.values()))

    def add(self, state: ReplayState) -> None:
        """Keep the pin of a request that ends, if it has one."""
        seconds, request = state.pin_seconds_left(), state.request
        pinned = request.prompt_token_ids[: request.cache_until]
        if seconds <= 0 or state.first is None or not pinned:
            return
        now = self._clock()
        self._expire(now)
        owner = (request.namespace, request.tenant, request.adapter)
        tokens = request.prompt_token_ids if request.adapter else pinned
        new = _Record(owner, tokens, len(pinned), now + seconds, self._chunk_size)
        key, tail = new.key, new.tail
        near = self._records.get(key, [])
        at = bisect_left(near, tail, key=_tail)
        if at < len(near) and near[at].tail[: len(tail)] == tail:
            near[at].until = max(near[at].until, new.until)
            return
        if at > 0 and tail[: len(near[at - 1].tail)] == near[at - 1].tail:
            new.until = max(near[at - 1].until, new.until)
            self._remove(near[at - 1])
        insort(self._records.setdefault(key, []), new, key=_tail)
        self._num_tokens += len(new.tokens)
        self._push(new)
        if self._num_tokens > self._max_tokens:
            self._drop_first()

    def _push(self, record: _Record) -> None:
        heapq.heappush(self._ends, (record.until, next(self._numbers), record))

    def _pop(self) -> None:
        """Remove the record at the head of the heap; one that ends later by now returns to it."""
        until, _, record = heapq.heappop(self._ends)
        if record.is_kept and record.until > until:
            self._push(record)
        elif record.is_kept:
            self._remove(record)

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self._pop()

    def _drop_first(self) -> None:
        logger.warning(
            "the pinned prompts have over %d tokens; those whose pins end first are not pinned "
            "again if the engine process is restarted",
            self._max_tokens,
        )
        while self._num_tokens > self._max_tokens:
            self._pop()

    def _remove(self, record: _Record) -> None:
        record.is_kept = False
        self._num_tokens -= len(record.tokens)
        key = record.key
        near = self._records[key]
        del near[bisect_left(near, record.tail, key=_tail)]
        if not near:
            del self._records[key]
        record.tokens = array("i")  # the heap still holds the record

    def remove(self, pin: EndedPin) -> None:
        """Remove what an operator has ended."""
        for record in list(itertools.chain(*self._records.values())):
            namespace, tenant, adapter = record.owner
            if tenant == pin.tenant and is_pin_of(pin, namespace, adapter, record.pinned):
                self._remove(record)

    def requests(self) -> list[EngineRequest]:
        """Requests that pin what has not expired, for the rest of its time, in order of arrival."""
        now = self._clock()
        self._expire(now)
        return [
            EngineRequest(
                request_id=f"restore-pin-{number}",
                prompt_token_ids=record.tokens.tolist(),
                cache_until=record.num_pinned,
                sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
                namespace=record.owner[0],
                tenant=record.owner[1],
                pin_seconds=record.until - now,
                is_replay=True,
                adapter=record.owner[2],
            )
            for number, record in enumerate(itertools.chain(*self._records.values()))
        ]
