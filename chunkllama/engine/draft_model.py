"""A small model that guesses what a larger one with the same tokenizer will write.

Its K/V are its own: a chunk pool without a tree, of which each sequence has chunks. They stay until
others need them, and are reused as far as the sequence's tokens are those that were computed. A
guess is drawn with the request's sampling parameters and the random numbers of its position, as the
larger model's sampler will draw, so that the two agree wherever their distributions are close.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.engine.sampler import Sampler, takes_best
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.model_drafts import DraftContext
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput
from chunkllama.scheduler.step_caps import PATIENCE
from chunkllama.text.tokenizer import load_tokenizer

logger = init_logger(__name__)

Int32Array = NDArray[np.int32]
_Key = tuple[str, int]


@dataclass(slots=True)
class _Entry:
    """A sequence's place: its chunks, and the tokens whose K/V they hold."""

    chunk_ids: list[int] = field(default_factory=list)
    tokens: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))


class DraftModel:
    """Implement ``scheduler.model_drafts.DraftModel``.

    Args:
        step_model: the model and a pool of its own.
        max_tokens: positions that it can compute.
        vocab_size: of the model that checks its guesses.
    """

    def __init__(self, step_model: StepModel, max_tokens: int, vocab_size: int) -> None:
        self._step_model = step_model
        self._max_tokens = max_tokens
        self._num_known = min(vocab_size, step_model.spec.vocab_size)
        self._chunk_size = step_model.kv.chunk_size
        self._free = list(range(step_model.kv.num_chunks))
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # used least recently first
        self._kept: set[_Key] = set()  # sequences of this step
        self._sampler = Sampler(step_model.spec.eos_token_ids, step_model.backend)
        self._num_paused = 0  # steps to come in which it computes nothing

    def warm_up(self) -> None:
        self._num_paused = 0
        greedy = SamplingParams(temperature=0.0, seed=0)
        contexts = [DraftContext(("", 0), np.zeros(1, np.int32), 1, greedy, 0)]
        self.begin_step(contexts)
        self.guess(contexts, 1)

    def begin_step(self, contexts: list[DraftContext]) -> list[int | None]:
        if self._num_paused:
            self._num_paused -= 1
            return [None] * len(contexts)
        for context in contexts:  # before any of them takes another one's place
            if context.key in self._entries:
                self._entries.move_to_end(context.key)
        self._kept = {context.key for context in contexts}
        return [self._missing(context) for context in contexts]

    def _missing(self, context: DraftContext) -> int | None:
        tokens = context.token_ids
        entry = self._entries.get(context.key, _Entry())
        known = min(_num_common(entry.tokens, tokens), len(tokens) - 1)
        entry.tokens = entry.tokens[:known]
        if int(tokens[known:].max()) >= self._num_known or not self._reserve(entry, len(tokens)):
            return None
        self._entries[context.key] = entry
        return len(tokens) - known

    def _reserve(self, entry: _Entry, num_tokens: int) -> bool:
        """Give a sequence chunks for its tokens; False: this step's sequences have all of them, or
        it is too long."""
        if num_tokens > self._max_tokens:
            return False
        wanted = -(-num_tokens // self._chunk_size) - len(entry.chunk_ids)
        while len(self._free) < wanted:
            key = next(iter(self._entries), None)
            if key is None or key in self._kept:
                return False
            self._free += self._entries.pop(key).chunk_ids
        for _ in range(wanted):
            entry.chunk_ids.append(self._free.pop())
        return True

    @torch.inference_mode()
    def compute(self, contexts: list[DraftContext], max_tokens: int) -> int:
        pieces, left = [], max_tokens
        for context in contexts:
            entry = self._entries[context.key]
            begin = len(entry.tokens)
            end = min(len(context.token_ids) - 1, begin + left)
            left -= end - begin
            if begin < end:
                pieces.append((entry, context.token_ids[begin:end]))
        if pieces:
            try:
                hidden = self._run(pieces)
            except torch.OutOfMemoryError as error:
                self._pause(error)
                return 0
            if hidden.is_cuda:  # its calls return before the work is done, and this one is timed
                torch.cuda.synchronize(hidden.device)
        return max_tokens - left

    @torch.inference_mode()
    def guess(self, contexts: list[DraftContext], depth: int) -> list[list[int]]:
        states = [_state(context) for context in contexts]
        entries = [self._entries[context.key] for context in contexts]
        inputs = [
            context.token_ids[len(entry.tokens) :]
            for context, entry in zip(contexts, entries, strict=True)
        ]
        guesses: list[list[int]] = [[] for _ in contexts]
        open_rows = list(range(len(contexts)))
        for turn in range(depth):
            open_rows = [
                row
                for row in open_rows
                if self._reserve(entries[row], len(contexts[row].token_ids) + turn)
            ]
            if not open_rows:
                break
            ends = np.cumsum([len(inputs[row]) for row in open_rows]) - 1
            try:
                hidden = self._run([(entries[row], inputs[row]) for row in open_rows])
                last = hidden[torch.from_numpy(ends)]
                drawn = self._draw(last, [states[row] for row in open_rows])
            except torch.OutOfMemoryError as error:
                self._pause(error)
                break
            following = []
            for row, token in zip(open_rows, drawn, strict=True):
                if token is None or token >= self._num_known:
                    continue
                guesses[row].append(token)
                states[row].output_token_ids.append(token)
                inputs[row] = np.array([token], np.int32)
                following.append(row)
            open_rows = following
        return guesses

    def _pause(self, error: torch.OutOfMemoryError) -> None:
        """Compute nothing in the next ``PATIENCE`` steps: the device has no memory for it."""
        logger.warning("guesses of the draft model did not fit: %s", str(error).partition("\n")[0])
        self._num_paused = PATIENCE
        torch.cuda.empty_cache()

    def _draw(self, hidden: torch.Tensor, states: list[SequenceState]) -> list[int | None]:
        """Return the next token of each row [R, H]; None where there is none to draw."""
        model = self._step_model.model
        if all(takes_best(state.sampling) for state in states):
            values, tokens = model.best_tokens(hidden)
            pairs = zip(tokens.tolist(), values.isfinite().tolist(), strict=True)
            return [token if is_finite else None for token, is_finite in pairs]
        outcomes = self._sampler.sample(model.logits(hidden), states, {})
        return [None if each.failed else each.token_id for each in outcomes]

    def _run(self, pieces: list[tuple[_Entry, Int32Array]]) -> torch.Tensor:
        """Compute tokens behind those of each sequence -> hidden states [T, H] of all of them."""
        slices = [
            ScheduledSlice(
                slot=row,
                first_position=len(entry.tokens),
                token_ids=tokens,
                chunk_ids=np.array(entry.chunk_ids, np.int32),
                shared=0,
                samples=True,
            )
            for row, (entry, tokens) in enumerate(pieces)
        ]
        hidden = self._step_model.run(SchedulerOutput(step=0, slices=slices, plan_version=0))
        for entry, tokens in pieces:
            entry.tokens = np.concatenate((entry.tokens, tokens), dtype=np.int32)
        return hidden

    def close(self) -> None:
        """Release the model and its pool."""
        self._step_model.close()


def check_tokenizers(model: Path, draft: Path) -> None:
    """Check that two models have the same tokens by the same ids, and split texts alike.

    Raises:
        ConfigError: they do not.
    """
    if _described(model) != _described(draft):
        raise ConfigError(
            f"draft_model: {draft} has another tokenizer than the model; choose a smaller model of "
            "the same family"
        )


def _described(folder: Path) -> tuple[Any, ...]:
    content = json.loads(load_tokenizer(folder).to_json())
    return tuple(content.get(name) for name in ("model", "added_tokens", "pre_tokenizer"))


def _num_common(a: Int32Array, b: Int32Array) -> int:
    """Tokens that two sequences begin with alike."""
    count = min(len(a), len(b))
    differs = np.flatnonzero(a[:count] != b[:count])
    return int(differs[0]) if len(differs) else count


def _state(context: DraftContext) -> SequenceState:
    """The sequence as its own sampler sees it, without what guesses are not asked for."""
    tokens, begin = context.token_ids, context.num_prompt_tokens
    return SequenceState(
        sampling=_plain(context.sampling),
        index=context.index,
        prompt_token_ids=tokens[:begin],
        output_token_ids=tokens[begin:].tolist(),
    )


def _plain(sampling: SamplingParams) -> SamplingParams:
    if sampling.logprobs is None and sampling.prompt_logprobs is None:
        return sampling
    return msgspec.structs.replace(sampling, logprobs=None, prompt_logprobs=None)
