"""Running sequences: their slots, age and place in tree order."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from operator import attrgetter
from typing import Final

import numpy as np

from chunkllama.cache.manager import SequenceChunks
from chunkllama.scheduler.output import NewSequence, ScheduledSlice
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.step_caps import StepCaps
from chunkllama.scheduler.tree_order import TreeOrder

NO_LIMIT: Final = 2**31 - 1


_age = attrgetter("age")


class RunningSequences:
    """Running sequences, oldest first in ``by_age``; each holds a slot and chunks.

    ``caps`` are what the device's memory has room for.

    Attributes:
        decodes, prompts: those with one token, or several, left when the step began; empty between
            steps.
        num_background: those in the background.
    """

    def __init__(self, max_num_seqs: int, chunk_size: int) -> None:
        self.by_age: list[Sequence] = []
        self.order = TreeOrder(chunk_size)
        self.caps = StepCaps()
        self.decodes: list[Sequence] = []
        self.prompts: list[Sequence] = []
        self.num_background = 0
        self._free_slots = list(range(max_num_seqs))
        self._freed_slots: list[int] = []
        self._new: list[Sequence] = []
        self._plan_key: tuple[int, tuple[int, ...]] = (0, ())
        self._plan_version = 0

    def __len__(self) -> int:
        return len(self.by_age)

    @property
    def num_free_slots(self) -> int:
        return max(min(len(self._free_slots), self.caps.sequences - len(self.by_age)), 0)

    def lift_caps(self) -> bool:
        """Drop the caps if they alone leave no slot; returns whether they did."""
        is_capped = bool(self._free_slots) and not self.num_free_slots
        return is_capped and self.caps.lift()

    def begin_step(self) -> list[Sequence]:
        """Sort the sequences by what they have left; returns those whose samples are deferred."""
        self.decodes = [s for s in self.by_age if s.num_tokens - s.num_computed_tokens == 1]
        if len(self.decodes) == len(self.by_age):
            self.prompts = []
            return []
        others = [s for s in self.by_age if s.num_tokens - s.num_computed_tokens != 1]
        self.prompts = [s for s in others if s.num_tokens - s.num_computed_tokens > 1]
        return [s for s in others if s.awaits_sample]

    def end_step(self) -> None:
        """Keep nothing of sequences that end with the step."""
        self.decodes, self.prompts = [], []

    def start(self, sequence: Sequence, chunks: SequenceChunks, num_computed: int) -> None:
        """Start the sequence with K/V of ``num_computed`` tokens in its chunks."""
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.chunks = chunks
        sequence.num_computed_tokens = num_computed
        self._new.append(sequence)
        self.num_background += sequence.is_background
        insort(self.by_age, sequence, key=_age)
        self.order.insert(sequence)

    def stop(self, sequence: Sequence) -> SequenceChunks:
        """Stop the sequence and return its chunks."""
        chunks = sequence.chunks
        assert chunks is not None and sequence.slot >= 0
        self.order.remove(sequence)
        self.num_background -= sequence.is_background
        del self.by_age[bisect_left(self.by_age, sequence.age, key=_age)]
        heapq.heappush(self._free_slots, sequence.slot)
        if sequence in self._new:
            self._new.remove(sequence)  # it was never sent to the executor
        else:
            self._freed_slots.append(sequence.slot)
        sequence.slot, sequence.chunks = -1, None
        sequence.num_scheduled = 0
        sequence.awaits_sample = False
        sequence.draft.drop()
        return chunks

    def take_copies(self) -> list[tuple[int, int, int]]:
        """Return the copies (source, destination, tokens) that this step's slices need."""
        copies = []
        for sequence in self.by_age:
            chunks = sequence.chunks
            assert chunks is not None
            if chunks.copies and sequence.num_scheduled:
                copies += chunks.copies
                chunks.copies = []
        return copies

    def renew(self, sequence: Sequence) -> None:
        """Resend the sequence: its tokens are not those the executor sampled."""
        if sequence not in self._new:
            self._freed_slots.append(sequence.slot)
            self._new.append(sequence)

    def take_freed_slots(self) -> list[int]:
        """Return slots freed since the last step, of which the executor still keeps state."""
        freed, self._freed_slots = self._freed_slots, []
        return freed

    def take_new_sequences(self) -> list[NewSequence]:
        """Return what the executor needs of sequences that start with this step."""
        new, self._new = self._new, []
        return [
            NewSequence(
                slot=s.slot,
                request_id=s.group.request_id,
                index=s.index,
                sampling=s.group.request.sampling,
                prompt_token_ids=s.prompt_token_ids,
                output_token_ids=s.output_token_ids,
                pooling=s.group.request.wants_hidden_states,
                adapter=s.group.adapter,
                max_tokens=s.group.max_tokens,
            )
            for s in new
        ]

    def slices(self) -> list[ScheduledSlice]:
        """A slice for each sequence with ``num_scheduled`` tokens, in tree order."""
        result: list[ScheduledSlice] = []
        shared = 0
        for sequence, shared_with_last in zip(self.order.sequences, self.order.shared, strict=True):
            # over skipped sequences the common path is the shortest of all on the way
            if shared_with_last < shared:
                shared = shared_with_last
            count, chunks = sequence.num_scheduled, sequence.chunks
            if not count:
                continue
            start, group = sequence.num_computed_tokens, sequence.group
            assert chunks is not None
            token_ids, draft = sequence.token_slice(start, count), sequence.draft.token_ids
            if draft:
                token_ids = np.concatenate((token_ids, draft), dtype=np.int32)
            result.append(
                ScheduledSlice(
                    sequence.slot,
                    start,
                    token_ids,
                    chunks.ids,
                    shared,
                    start + count == sequence.num_tokens and group.max_tokens > 0,
                    group.collects_prompt_logprobs and sequence.wants_prompt_logits,
                    len(draft),
                )
            )
            shared = NO_LIMIT
        return result

    def plan_version(self, scheduled: list[Sequence]) -> int:
        """Return 0 if a slice has several tokens, else a number that identifies the row list."""
        if any(s.num_scheduled > 1 or s.draft.token_ids for s in reversed(scheduled)):
            return 0
        is_part = len(scheduled) < len(self.by_age)
        slots = tuple(sorted(s.slot for s in scheduled)) if is_part else ()
        key = self.order.version, slots
        if key != self._plan_key:
            self._plan_key = key
            self._plan_version += 1
        return self._plan_version

    def check_invariants(self) -> None:
        """Slots are kept apart, ``by_age`` and the tree order hold the same sequences."""
        slots = [s.slot for s in self.by_age]
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots)
        assert [s.age for s in self.by_age] == sorted(s.age for s in self.by_age)
        assert self.num_background == sum(s.is_background for s in self.by_age)
        assert {id(s) for s in self.by_age} == {id(s) for s in self.order.sequences}
        self.order.check_invariants()
