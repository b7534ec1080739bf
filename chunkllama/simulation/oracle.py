"""The outputs of a fake model for each request alone, computed from its tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from chunkllama.sampling_params import SamplingParams
from chunkllama.simulation.fake_model import Numbers, candidates, logprob, sample, value_at


class Oracle:
    """Computes what each request must yield.

    Args:
        window: of the fake model.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        window: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._window = window
        self.eos_token_ids = eos_token_ids
        self._values: dict[tuple[int, ...], Numbers] = {}

    def numbers(self, tokens: Iterable[int]) -> list[int]:
        """Return the number of every position."""
        tokens = list(tokens)
        values = np.empty(len(tokens), np.uint64)
        for i, token_id in enumerate(tokens):
            values[i] = value_at(values[:i], token_id, self._window)
        return [int(value) for value in values]

    def choice(
        self, prompt: list[int], sampling: SamplingParams, max_tokens: int, index: int
    ) -> tuple[list[int], list[float], str]:
        """Return tokens, fingerprints and finish reason of one choice."""
        values = np.empty(len(prompt) + max_tokens, np.uint64)
        values[: len(prompt)] = self._prompt_values(tuple(prompt))
        tokens: list[int] = []
        prints: list[float] = []
        while len(tokens) < max_tokens:
            last = int(values[len(prompt) + len(tokens) - 1])
            token_id = sample(last, self.vocab_size, index)
            tokens.append(token_id)
            prints.append(logprob(last))
            stops = token_id in sampling.stop_token_ids or (
                token_id in self.eos_token_ids and not sampling.ignore_eos
            )
            if stops and len(tokens) >= sampling.min_tokens:
                return tokens, prints, "stop"
            at = len(prompt) + len(tokens) - 1
            values[at] = value_at(values[:at], token_id, self._window)
        return tokens, prints, "length"

    def beams(
        self, prompt: list[int], sampling: SamplingParams, max_tokens: int
    ) -> list[tuple[list[int], str]]:
        """Return the n best hypotheses of a beam search over plain token lists."""
        width = sampling.beam_width
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)}
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int], str]] = []
        for length in range(1, max_tokens + 1):
            grown = []
            for total, tokens in live:
                last = self.numbers([*prompt, *tokens])[-1]
                for token_id, lp in candidates(last, self.vocab_size, width):
                    grown.append((total + lp, [*tokens, token_id]))
            grown.sort(key=lambda beam: -beam[0])
            live = []
            for rank, (total, tokens) in enumerate(grown):
                if tokens[-1] in stops and length >= sampling.min_tokens:
                    if rank < width:
                        ended.append((total / length**sampling.length_penalty, tokens, "stop"))
                elif len(live) < width:
                    live.append((total, tokens))
                if len(live) == width:
                    break
            ended.sort(key=lambda beam: -beam[0])
            del ended[width:]
            best = live[0][0] / length**sampling.length_penalty if live else -1e9
            if not live or (len(ended) == width and best <= ended[-1][0]):
                break
        else:
            ended += [(t / max_tokens**sampling.length_penalty, k, "length") for t, k in live]
            ended.sort(key=lambda beam: -beam[0])
        return [(tokens, reason) for _, tokens, reason in ended[: sampling.n]]

    def _prompt_values(self, prompt: tuple[int, ...]) -> Numbers:
        if prompt not in self._values:
            self._values[prompt] = np.array(self.numbers(prompt), np.uint64)
        return self._values[prompt]
