"""Beam search: which hypotheses go on. Numbers only; the scheduler forks and drops sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chunkllama.messages import FinishReason
from chunkllama.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam; ``score`` is its log-probability over length ** length_penalty."""

    token_ids: list[int]
    score: float
    finish_reason: FinishReason
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Extension:
    """Beam ``parent`` continues with ``token_id``; a parent may have several children or none."""

    parent: int
    token_id: int
    logprob: float


class BeamSearch:
    """Live beams of one request, keyed by sequence index, and the best finished hypotheses.

    Beams advance together: each is fed its candidates, then ``advance`` picks the ``width`` best
    continuations of all. A candidate that stops becomes a hypothesis. The search ends when no
    live beam scores better than the worst of ``width`` hypotheses (the criterion of Hugging
    Face's ``early_stopping=False``) or when the output is full.
    """

    def __init__(
        self, sampling: SamplingParams, max_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.width = sampling.beam_width
        self.is_expanded = False
        self._n = sampling.n
        self._min_tokens = sampling.min_tokens
        self._max_tokens = max_tokens
        self._length_penalty = sampling.length_penalty
        self._stops = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._stops |= eos_token_ids
        self._logprobs: dict[int, float] = {0: 0.0}
        self._candidates: dict[int, list[tuple[int, float]]] = {}
        self._hypotheses: list[Hypothesis] = []

    def feed(self, index: int, candidates: list[tuple[int, float]]) -> None:
        """The best (token id, log-probability) pairs after beam ``index``."""
        assert candidates, "a beam without candidates"
        self._candidates[index] = candidates

    def forget(self, index: int) -> None:
        """The beam was preempted; it will be fed again."""
        self._candidates.pop(index, None)

    @property
    def is_fed(self) -> bool:
        return len(self._candidates) == len(self._logprobs)

    def advance(self, outputs: dict[int, list[int]]) -> list[Extension]:
        """Choose the continuations; [] when the search is over.

        Args:
            outputs: output tokens of each live beam so far.
        """
        extensions = [
            Extension(index, token_id, self._logprobs[index] + logprob)
            for index, candidates in sorted(self._candidates.items())
            for token_id, logprob in candidates
        ]
        extensions.sort(key=lambda e: -e.logprob)
        self._candidates.clear()
        self.is_expanded = True
        length = len(outputs[extensions[0].parent]) + 1
        live: list[Extension] = []
        for rank, extension in enumerate(extensions):
            stops = extension.token_id in self._stops and length >= self._min_tokens
            if stops and rank < self.width:
                self._finish(outputs[extension.parent], extension, "stop")
            elif not stops:
                live.append(extension)
            if len(live) == self.width:
                break
        if length >= self._max_tokens:
            for extension in live:
                self._finish(outputs[extension.parent], extension, "length")
            live = []
        elif live and self._is_decided(live[0].logprob, length):
            live = []
        return live

    def bind(self, logprobs: dict[int, float]) -> None:
        """The live beams from now on: sequence index -> log-probability."""
        self._logprobs = logprobs

    def best(self) -> list[Hypothesis]:
        """The n best hypotheses, best first; the last again where fewer than n exist at all."""
        best = self._hypotheses[: self._n]
        return best + best[-1:] * (self._n - len(best))

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self._length_penalty)

    def _finish(self, output: list[int], extension: Extension, reason: FinishReason) -> None:
        token_ids = [*output, extension.token_id]
        score = self._score(extension.logprob, len(token_ids))
        stop = extension.token_id if reason == "stop" else None
        self._hypotheses.append(Hypothesis(token_ids, score, reason, stop))
        self._hypotheses.sort(key=lambda h: -h.score)
        del self._hypotheses[self.width :]

    def _is_decided(self, best_live: float, length: int) -> bool:
        if len(self._hypotheses) < self.width:
            return False
        return self._score(best_live, length) <= self._hypotheses[-1].score
