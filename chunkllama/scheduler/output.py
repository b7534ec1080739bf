"""What the scheduler hands to an executor and gets back: plain arrays and numbers.

No tree, no request objects: a message can be encoded and sent to N tensor-parallel ranks
unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.messages import TokenLogprob
from chunkllama.sampling_params import SamplingParams

Int32Array = NDArray[np.int32]


class NewSequence(msgspec.Struct, frozen=True):
    """State an executor keeps for a slot from now on until the slot is in ``freed_slots``.

    Sent when a sequence is first scheduled and again after a preemption (then ``output_token_ids``
    holds what was already sampled, and the random numbers go on from there). Slots are freed
    before new sequences take theirs: one output may hold a slot in both lists.
    """

    slot: int
    request_id: str
    index: int
    sampling: SamplingParams  # seed is never None here
    prompt_token_ids: Int32Array
    output_token_ids: Int32Array
    pooling: Literal["", "mean", "last"] = ""
    adapter: AdapterUse | None = None
    max_tokens: int | None = None  # output tokens it may have


class ScheduledSlice(msgspec.Struct, frozen=True):
    """Consecutive tokens of one sequence computed in this step; a decode is a slice of one token.

    Attributes:
        slot: the sequence's stable slot in device state.
        first_position: position of ``token_ids[0]``; the K/V of all earlier positions is computed
            by earlier steps or by other slices of this very step (append precedes attention in
            each layer).
        token_ids: [num_tokens] int32.
        chunk_ids: [>= ceil(end / chunk_size)] int32, chunk of positions 0.., chunk_size.., ...;
            spares included. A view, valid until ``commit()``.
        shared: number of leading chunks with the same ids as in the previous slice of the list
            (0 for the first).
        samples: the last token's logits yield a token.
        wants_prompt_logits: every row's logits are needed (prompt_logprobs).
        num_drafts: the last tokens of the slice that are guesses; each row from the one before the
            first of them on yields a token, as long as the guesses before it were right.
    """

    slot: int
    first_position: int
    token_ids: Int32Array
    chunk_ids: Int32Array
    shared: int
    samples: bool
    wants_prompt_logits: bool = False
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. ``slices`` stand in tree depth-first order: common paths are neighbours.

    ``plan_version`` changes only when the decode plan has to be rebuilt: join, leave, adopt, copy,
    preempt, spares used up. It is 0 when some slice has more than one token (a plan for this step
    alone).
    ``copies`` are (source chunk, destination chunk, tokens), done before the first layer.
    ``awaited`` are slots whose token an earlier step deferred; they have no slice.
    ``wants_forced``: report the tokens that a grammar leaves no choice for.
    """

    step: int
    slices: list[ScheduledSlice]
    plan_version: int
    new_sequences: list[NewSequence] = field(default_factory=list)
    freed_slots: list[int] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)
    wants_forced: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.slices)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What one executed step yielded, keyed by slot.

    ``failed`` maps a slot to a reason (e.g. "model_nan"): its request ends with an error, its
    batch mates go on.
    ``prompt_logprobs[slot]`` has one entry per token of the slice, for the *next* position of each
    row.
    ``beam_candidates[slot]`` (beam search only): the best (token id, log-probability) pairs at the
    sampled position.
    ``finished_grammar``: slots whose grammar accepts nothing more after the sampled token;
    ``closed_grammar``: those of them whose answer was ended because its tokens ran out.
    ``deferred``: slots that were to be sampled and are not yet; they stay in the ``awaited`` of the
    next steps until they have a token.
    ``accepted``: the guesses of a slice that equal what was sampled, each with its
    log-probability; the token in ``token_ids`` comes after them.
    ``forced``: after that token, those that the slot's grammar leaves no choice for.
    ``ran_out``: the device lacked memory for the step, of which nothing may be used.
    """

    token_ids: dict[int, int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    embeddings: dict[int, list[float]] = field(default_factory=dict)
    beam_candidates: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    finished_grammar: set[int] = field(default_factory=set)
    closed_grammar: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    deferred: set[int] = field(default_factory=set)
    accepted: dict[int, list[tuple[int, TokenLogprob | None]]] = field(default_factory=dict)
    forced: dict[int, list[int]] = field(default_factory=dict)
    ran_out: bool = False
