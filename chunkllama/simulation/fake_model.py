"""A model of numbers instead of tensors, which notices any wrong, stale or unfilled K/V.

The fake model keeps a number for every (chunk, slot), as the real one keeps K and V. The number at
position p is a hash of the token there and of *every* number read at positions before it, so one
wrong slot anywhere changes all that follows.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from chunkllama.messages import TokenLogprob
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import (
    NewSequence,
    SampledTokens,
    ScheduledSlice,
    SchedulerOutput,
)

Numbers = NDArray[np.uint64]

MAX_POSITIONS = 16384
ROOM = 2**31 - 1  # tokens of a step that fit
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, MAX_POSITIONS, dtype=np.uint64) | np.uint64(
    1
)
_MASK = 2**64 - 1


def _mix(read: int, token_id: int, position: int) -> int:
    x = (read ^ (token_id + 1) * 0x9E3779B97F4A7C15 ^ (position + 1) * 0xC2B2AE3D27D4EB4F) & _MASK
    x = ((x ^ (x >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
    return x ^ (x >> 32)


def value_at(history: Numbers, token_id: int, window: int | None = None) -> int:
    """Return the number of a position, from the numbers of all earlier ones that its window shows,
    itself included.
    """
    position = len(history)
    first = 0 if window is None else max(position + 1 - window, 0)
    read = int(np.dot(history[first:], _WEIGHTS[first:position])) if first < position else 0
    return _mix(read, token_id, position)


def sample(value: int, vocab_size: int, index: int) -> int:
    """Return the next token: a function of the last number and of which choice it is."""
    return ((value >> 7) + index * (value >> 31)) % vocab_size


def logprob(value: int) -> float:
    """Return a fingerprint of the whole history; two tokens alone may agree by chance."""
    return -float(value >> 11) / 2**53


def candidates(value: int, vocab_size: int, width: int) -> list[tuple[int, float]]:
    """Return distinct tokens with made-up log-probabilities, best first."""
    first = value % vocab_size
    untie = (value >> 13) % 1_000_003 * 1e-9
    return [
        ((first + i) % vocab_size, -0.1 - untie - i * (0.05 + (value >> (i + 8)) % 97 / 97))
        for i in range(min(2 * width, vocab_size))
    ]


class FakeModel:
    """An executor over one number per slot of the pool.

    Args:
        window: tokens that a position reads, itself included; None: all before it.

    Attributes:
        fail_slots: slots whose rows fail in the next step.
        defer_share: part of the samples that wait for a later step, at random.
        room: tokens of a step; of a larger one nothing may be used.
    """

    def __init__(
        self, num_chunks: int, chunk_size: int, vocab_size: int, window: int | None = None
    ) -> None:
        self.chunk_size = chunk_size
        self._window = window
        self.vocab_size = vocab_size
        self.kv = np.random.default_rng(0).integers(
            0, 2**63, num_chunks * chunk_size, dtype=np.uint64
        )
        self.sequences: dict[int, NewSequence] = {}
        self.fail_slots: set[int] = set()
        self.defer_share = 0.0
        self.room = ROOM
        self._random = random.Random(0)
        self._late: dict[int, int] = {}
        self._offsets = np.arange(chunk_size)

    def prepare(self, sampling: SamplingParams) -> None:
        """Do nothing: no grammar is compiled."""

    def read_chunk(self, chunk_id: int) -> bytes:
        """Copy the numbers of a chunk."""
        return self.kv[chunk_id * self.chunk_size : (chunk_id + 1) * self.chunk_size].tobytes()

    def paste_chunk(self, chunk_id: int, data: bytes | bytearray | memoryview) -> None:
        """Store the numbers of a chunk."""
        numbers = np.frombuffer(data, np.uint64)
        self.kv[chunk_id * self.chunk_size : (chunk_id + 1) * self.chunk_size] = numbers

    def execute(self, output: SchedulerOutput) -> SampledTokens:
        """Compute the step, as the executor of an engine does."""
        for slot in output.freed_slots:
            del self.sequences[slot]
            self._late.pop(slot, None)
        for new in output.new_sequences:
            assert new.slot not in self.sequences, "a slot was given twice"
            self.sequences[new.slot] = new
        if output.num_tokens > self.room:
            self._spoil(output)
            return SampledTokens(token_ids={}, ran_out=True)
        self._copy(output.copies)
        sampled = SampledTokens(token_ids={})
        values = self._compute(output)
        for piece in output.slices:
            if piece.slot in self.fail_slots:
                sampled.failed[piece.slot] = "model_nan"
            else:
                self._sample(sampled, piece, values[piece.slot])
        assert {*output.awaited} == {*self._late} - {piece.slot for piece in output.slices}
        for slot in output.awaited:
            value = self._late.pop(slot)
            if slot in self.fail_slots:
                sampled.failed[slot] = "model_nan"
            else:
                self._draw(sampled, slot, value)
        return sampled

    def _spoil(self, output: SchedulerOutput) -> None:
        """Write garbage where the step would write; its copies are not made."""
        size = self.chunk_size
        for piece in output.slices:
            for position in range(piece.first_position, piece.first_position + piece.num_tokens):
                self.kv[piece.chunk_ids[position // size] * size + position % size] = 1

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        """In any order: no copy writes what another reads or writes."""
        size = self.chunk_size
        written = [dst for _, dst, _ in copies]
        assert len({*written}) == len(written) and not {src for src, _, _ in copies} & {*written}
        for src, dst, n in copies:
            self.kv[dst * size : dst * size + n] = self.kv[src * size : src * size + n]

    def _compute(self, output: SchedulerOutput) -> dict[int, list[int]]:
        """Rows by position: in each layer of the real model, append precedes attention."""
        size, kv = self.chunk_size, self.kv
        slots = {
            piece.slot: (piece.chunk_ids[:, None] * size + self._offsets).ravel()
            for piece in output.slices
        }
        rows = [
            (piece.first_position + i, piece.slot, int(token_id))
            for piece in output.slices
            for i, token_id in enumerate(piece.token_ids)
        ]
        rows.sort()
        values: dict[int, list[int]] = {piece.slot: [] for piece in output.slices}
        for position, slot, token_id in rows:
            where = slots[slot]
            value = value_at(kv[where[:position]], token_id, self._window)
            if slot in self.fail_slots:
                value ^= 0x5A5A5A5A5A5A  # what a failing sequence writes is garbage
            kv[where[position]] = value
            values[slot].append(value)
        return values

    def _sample(self, sampled: SampledTokens, piece: ScheduledSlice, values: list[int]) -> None:
        sequence = self.sequences[piece.slot]
        if piece.wants_prompt_logits:
            sampled.prompt_logprobs[piece.slot] = [
                TokenLogprob(0, logprob(value), 1, []) for value in values
            ]
        if sequence.pooling and piece.first_position + len(values) == len(
            sequence.prompt_token_ids
        ):
            sampled.embeddings[piece.slot] = [logprob(values[-1])]
        if not piece.samples:
            return
        values = values[-1 - piece.num_drafts :]
        drafts = piece.token_ids[len(piece.token_ids) - piece.num_drafts :].tolist()
        for value, draft in zip(values, [*drafts, None], strict=True):
            self._draw(sampled, piece.slot, value, may_defer=value is values[0])
            if sampled.token_ids.get(piece.slot) != draft or draft is None:
                break
            entry = draft, sampled.logprobs[piece.slot]
            sampled.accepted.setdefault(piece.slot, []).append(entry)

    def _draw(
        self, sampled: SampledTokens, slot: int, value: int, *, may_defer: bool = True
    ) -> None:
        """Sample now, or in a later step, as an executor that is short of time does."""
        if may_defer and self._random.random() < self.defer_share:
            self._late[slot] = value
            sampled.deferred.add(slot)
            return
        sequence = self.sequences[slot]
        width = sequence.sampling.beam_width
        if width > 1:
            sampled.beam_candidates[slot] = candidates(value, self.vocab_size, width)
        sampled.token_ids[slot] = sample(value, self.vocab_size, sequence.index)
        sampled.logprobs[slot] = TokenLogprob(0, logprob(value), 1, [])
