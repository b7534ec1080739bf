"""A request inside the scheduler: a group of sequences, each catching up with its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.manager import SequenceChunks
from chunkllama.cache.node import TOKEN_BYTES, encode_tokens
from chunkllama.cache.tier_entry import Promotion
from chunkllama.messages import (
    BACKGROUND_PRIORITY,
    CacheExplanation,
    EngineRequest,
    FinishReason,
    TokenLogprob,
)
from chunkllama.scheduler.beam import BeamSearch
from chunkllama.scheduler.draft_state import DraftState

Int32Array = NDArray[np.int32]


class Sequence:
    """One choice. There are no phases: ``num_computed_tokens`` catches up with ``num_tokens``.

        tokens   [ prompt ............ | output ... ]
                  ^ num_cached at admission  ^ num_tokens (num_admitted at admission)
                          ^ num_computed_tokens: K/V of everything before is in ``chunks``

    Attributes:
        age: smaller is older; a preemption does not make a sequence younger.
        is_background: it yields to the prompts of other requests.
        tenant: of its request.
        max_kv_tokens: positions whose K/V it may ever need; the last token's never is.
        slot: index of its device state while it runs, else -1.
        chunks: its chunks while it runs, else None.
        num_scheduled: tokens of it in the step being put together or in flight.
        num_admitted: tokens known when it was admitted; computing those is prefill.
        awaits_sample: its last token is computed and the executor has deferred the next one.
        draft: guesses at its next tokens.
        read: the last read of the tier that it has waited for since it ran.
        num_reads: those reads.
    """

    __slots__ = (
        "_key",
        "_tokens",
        "age",
        "awaits_sample",
        "chunks",
        "draft",
        "group",
        "index",
        "is_background",
        "max_kv_tokens",
        "num_admitted",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_reads",
        "num_scheduled",
        "num_tokens",
        "read",
        "slot",
        "tenant",
    )

    def __init__(self, group: SequenceGroup, index: int, tokens: Int32Array) -> None:
        self.group = group
        self.index = index
        self.age = group.arrival, index
        self.is_background = group.request.priority >= BACKGROUND_PRIORITY
        self.tenant = group.request.tenant
        self._tokens = tokens  # of several sequences, until one is appended
        self._key = b""
        self.num_tokens = len(self._tokens)
        self.num_prompt_tokens = group.num_prompt_tokens
        self.max_kv_tokens = self.num_prompt_tokens + max(group.max_tokens - 1, 0)
        self.num_computed_tokens = 0
        self.num_admitted = 0
        self.num_scheduled = 0
        self.slot = -1
        self.chunks: SequenceChunks | None = None
        self.awaits_sample = False
        self.draft = DraftState()
        self.read: Promotion | None = None
        self.num_reads = 0

    @property
    def joins_others(self) -> bool:
        """It is a beam of a search that has begun, whose beams advance together."""
        return self.group.beam is not None and self.group.beam.is_expanded

    @property
    def token_ids(self) -> Int32Array:
        """Prompt and output, a view."""
        return self._tokens[: self.num_tokens]

    @property
    def cache_ids(self) -> Int32Array:
        """``token_ids`` as the prefix tree knows them: told apart by the adapter."""
        use = self.group.adapter
        return self.token_ids if use is None else use.tagged(self.token_ids)

    @property
    def cache_key(self) -> bytes:
        """``cache_ids``, encoded; kept until a token is appended."""
        if len(self._key) != TOKEN_BYTES * self.num_tokens:
            self._key = encode_tokens(self.cache_ids)
        return self._key

    def adapter_at(self, position: int) -> int:
        """Number of the adapter that is active at a position; 0 is none."""
        use = self.group.adapter
        return 0 if use is None or position < use.start else use.number

    @property
    def prompt_token_ids(self) -> Int32Array:
        return self._tokens[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> Int32Array:
        return self._tokens[self.num_prompt_tokens : self.num_tokens]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that are not computed yet."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def wants_prompt_logits(self) -> bool:
        """Its slices still have to yield log-probabilities of the prompt."""
        return self.index == 0 and self.group.collects_prompt_logprobs

    def token_slice(self, start: int, count: int) -> Int32Array:
        """Tokens [start, start + count), a view."""
        return self._tokens[start : start + count]

    def append(self, token_id: int) -> None:
        if self.num_tokens == len(self._tokens):
            grown = np.empty(2 * self.num_tokens, np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def finish_reason(
        self, eos_token_ids: frozenset[int]
    ) -> tuple[FinishReason | None, int | None]:
        """Whether the last token ends the choice, and the stop token if one did."""
        sampling = self.group.request.sampling
        num_output = self.num_output_tokens
        if num_output == 0:
            return None, None
        token_id = int(self._tokens[self.num_tokens - 1])
        if num_output >= sampling.min_tokens and (
            (token_id in eos_token_ids and not sampling.ignore_eos)
            or token_id in sampling.stop_token_ids
        ):
            return "stop", token_id
        if num_output >= self.group.max_tokens:
            return "length", None
        return None, None


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request. The prompt counts once, in usage as in admission.

    Attributes:
        arrival: number in order of arrival; ``arrived_at`` the same in seconds.
        started_at, prefilled_at: when its first sequence was first admitted, and had its prompt
            computed; in seconds, set once.
        max_tokens: of each choice, resolved; 0 scores or pools the prompt and samples nothing.
        sequences: those not finished, by index.
        held: it may not start yet.
        num_cached_tokens: prompt tokens that were not computed again; -1 until admitted.
        num_cache_write_tokens: prompt tokens that the request adds to the cache.
        num_rounded_tokens: those of them whose K/V the tier has rounded.
        prompt_logprobs: entries so far; the first is None (nothing comes before it).
        explanation: of the prompt's match, until it is sent.
        adapter: that its sequences use; None is the base model.
        prediction: tokens that the client expects as output.
        num_accepted_predicted, num_rejected_predicted: guesses from the request's prediction that
            were right and that were not, until they are sent.
    """

    request: EngineRequest
    arrival: int
    arrived_at: float
    max_tokens: int
    sequences: dict[int, Sequence] = field(default_factory=dict)
    held: bool = False
    beam: BeamSearch | None = None
    num_cached_tokens: int = -1
    num_cache_write_tokens: int = 0
    num_rounded_tokens: int = 0
    started_at: float = 0.0
    prefilled_at: float | None = None
    collects_prompt_logprobs: bool = False
    prompt_logprobs: list[TokenLogprob | None] | None = None
    is_pinned: bool = False
    pin_refused: bool = False
    explanation: CacheExplanation | None = None
    adapter: AdapterUse | None = None
    prediction: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    num_accepted_predicted: int = 0
    num_rejected_predicted: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_running(self) -> bool:
        """One of its sequences runs."""
        return any(sequence.chunks is not None for sequence in self.sequences.values())

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def insert_limit(self) -> int:
        """Tokens of each sequence that may be shown to others."""
        until = self.request.cache_until
        if until is None or until >= self.num_prompt_tokens:
            return 2**62
        return until
