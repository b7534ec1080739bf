"""From logits to tokens, vectorised over the batch.

Order, as in vLLM: grammar, allowed tokens, bad words, min_tokens, bias, penalties, temperature,
min-p, top-k, top-p, draw. A row's draw depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.engine.logprobs import best_tokens, token_logprobs
from chunkllama.engine.philox import uniforms
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.outputs import TokenLogprob
from chunkllama.sampling_params import SamplingParams

_MIN_TEMPERATURE = 1e-5  # below it the scaled logits overflow; the draw is the best token anyway
_BLOCK = 256  # the draw walks sums of blocks first, then one block
_TOP_WIDTHS = (
    256,
    4096,
)  # a top-p set is nearly always this small; sorting all costs 20 times more


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome; ``failed`` is a reason instead of a token."""

    token_id: int
    logprob: TokenLogprob | None = None
    beam_candidates: list[tuple[int, float]] | None = None
    failed: str = ""


class Sampler:
    """Draws one token per row.

    Args:
        eos_token_ids: what ``min_tokens`` holds back beside a request's own stop tokens.
    """

    def __init__(self, eos_token_ids: Iterable[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(
        self,
        logits: torch.Tensor,
        sequences: list[SequenceState],
        masks: dict[int, NDArray[np.int32]],
    ) -> list[Sampled]:
        """One outcome per row.

        Args:
            logits: [N, V] float32; overwritten.
            sequences: of the N rows.
            masks: row -> grammar bit mask [ceil(V / 32)].
        """
        best, greedy = logits.max(dim=1)
        if not masks and all(_is_plain(sequence.sampling) for sequence in sequences):
            return [
                Sampled(token, failed="" if finite else "model_nan")
                for token, finite in zip(greedy.tolist(), best.isfinite().tolist(), strict=True)
            ]
        broken = ~best.isfinite()
        if bool(broken.any()):
            logits[broken] = 0.0
        raw = _raw_logprobs(logits, sequences)
        self._edit(logits, sequences, masks)
        best, greedy = logits.max(dim=1)
        tokens = greedy
        drawn = [r for r, s in enumerate(sequences) if s.sampling.temperature >= _MIN_TEMPERATURE]
        beams = _beam_candidates(logits, sequences)
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            tokens = greedy.index_put((rows,), _draw(logits[rows], [sequences[r] for r in drawn]))
        token_ids = tokens.tolist()
        logprobs = _logprobs(raw, sequences, token_ids)
        failed = [
            "model_nan" if nan else "" if finite else "no_allowed_token"
            for nan, finite in zip(broken.tolist(), best.isfinite().tolist(), strict=True)
        ]
        return [
            Sampled(token, logprobs.get(row), beams.get(row), failed[row])
            for row, token in enumerate(token_ids)
        ]

    def _edit(
        self,
        logits: torch.Tensor,
        sequences: list[SequenceState],
        masks: dict[int, NDArray[np.int32]],
    ) -> None:
        for row, mask in masks.items():
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[1]]
            allowed = torch.from_numpy(bits).to(logits.device).bool()
            logits[row].masked_fill_(~allowed, -torch.inf)
        vocab_size = logits.shape[1]
        additions = _Entries(vocab_size)
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if sampling.allowed_token_ids:
                known = [token for token in sampling.allowed_token_ids if token < vocab_size]
                ids = torch.tensor(known, dtype=torch.int64, device=logits.device)
                kept = logits[row, ids]
                logits[row] = -torch.inf
                logits[row, ids] = kept
            for token in self._banned(sequence):
                additions.add(row, token, -np.inf)
            for token, bias in sampling.logit_bias.items():
                additions.add(row, token, bias)
        if additions:
            where, values = additions.tensors(logits.device)
            logits.index_put_(where, values, accumulate=True)
        _penalise(logits, sequences)

    def _banned(self, sequence: SequenceState) -> Iterable[int]:
        sampling, output = sequence.sampling, sequence.output_token_ids
        if len(output) < sampling.min_tokens:
            yield from sampling.stop_token_ids
            if not sampling.ignore_eos:
                yield from self._eos_token_ids
        for *start, last in sampling.bad_words_token_ids:
            if not start or output[-len(start) :] == start:
                yield last


def _is_plain(sampling: SamplingParams) -> bool:
    return (
        sampling.temperature < _MIN_TEMPERATURE
        and sampling.logprobs is None
        and sampling.beam_width == 1
        and not _is_penalised(sampling)
        and not sampling.logit_bias
        and not sampling.allowed_token_ids
        and not sampling.bad_words_token_ids
        and not sampling.min_tokens
    )


def _is_penalised(sampling: SamplingParams) -> bool:
    return (
        sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
    )


class _Entries:
    """Sparse (row, column, value) entries of the logits; unknown tokens are dropped."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, column: int, value: float) -> None:
        if 0 <= column < self._num_columns:
            self._rows.append(row)
            self._columns.append(column)
            self._values.append(value)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def tensors(
        self, device: torch.device
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        rows, columns = torch.tensor([self._rows, self._columns], device=device)
        return (rows, columns), torch.tensor(self._values, device=device)


def _penalise(logits: torch.Tensor, sequences: list[SequenceState]) -> None:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858), frequency and presence over the
    output (OpenAI's definition).
    """
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if not _is_penalised(sampling):
            continue
        output, counts = np.unique(
            np.array(sequence.output_token_ids, np.int64), return_counts=True
        )
        if sampling.repetition_penalty != 1.0:
            seen = np.union1d(sequence.prompt_token_ids, output)
            ids = torch.from_numpy(seen.astype(np.int64)).to(logits.device)
            values, factor = logits[row, ids], sampling.repetition_penalty
            logits[row, ids] = torch.where(values > 0, values / factor, values * factor)
        penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
        ids = torch.from_numpy(output).to(logits.device)
        logits[row, ids] -= torch.from_numpy(penalty).to(logits.device, torch.float32)


def _draw(logits: torch.Tensor, sequences: list[SequenceState]) -> torch.Tensor:
    """Token ids [R] drawn from logits [R, V] (overwritten) by inversion, in order of token id.

    Where several tokens tie at the edge of a top-k or top-p set, all of them are in it.
    """
    sampling = [sequence.sampling for sequence in sequences]
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    logits /= column([s.temperature for s in sampling])
    top = logits.amax(dim=1, keepdim=True)
    logits -= torch.where(top.isfinite(), top, 0.0)
    floor = column([np.log(s.min_p) if s.min_p > 0 else -np.inf for s in sampling])
    floor = _top_k_floor(logits, floor, [s.top_k for s in sampling])
    floor = _top_p_floor(logits, floor, [s.top_p for s in sampling])
    kept = logits >= floor
    weights = logits.exp_().mul_(kept)
    draws = uniforms(
        [s.seed or 0 for s in sampling],
        [sequence.index for sequence in sequences],
        [len(sequence.output_token_ids) for sequence in sequences],
    )
    return _invert(weights, torch.from_numpy(draws).to(device))


def _top_k_floor(logits: torch.Tensor, floor: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """The smallest logit [R, 1] that is in the row's top-k set and above ``floor``."""
    vocab_size = logits.shape[1]
    limits = [k if 0 < k < vocab_size else vocab_size for k in top_k]
    limited = [k for k in limits if k < vocab_size]
    if not limited:
        return floor
    values = logits.topk(max(limited), dim=1).values
    index = torch.tensor(limits, device=logits.device)[:, None].clamp(max=values.shape[1]) - 1
    is_limited = torch.tensor([k < vocab_size for k in limits], device=logits.device)[:, None]
    return torch.where(is_limited, torch.maximum(floor, values.gather(1, index)), floor)


def _top_p_floor(logits: torch.Tensor, floor: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """The smallest logit [R, 1] of the smallest set, best first, that holds ``top_p`` of the mass
    above ``floor`` (nucleus sampling, arXiv 1904.09751).
    """
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return floor
    index = torch.tensor(rows, device=logits.device)
    chosen, lowest = logits[index], floor[index]
    share = torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device=logits.device)
    mass = (chosen.exp() * (chosen >= lowest)).sum(dim=1, dtype=torch.float64)
    wanted = (share * mass)[:, None]
    vocab_size = logits.shape[1]
    for width in (*_TOP_WIDTHS, vocab_size):
        values = chosen.topk(min(width, vocab_size), dim=1).values
        weights = (values.exp() * (values >= lowest)).double()
        before = weights.cumsum(dim=1) - weights
        inside = (before < wanted) & (weights > 0)
        if width >= vocab_size or not bool(inside[:, -1].any()):
            break
    last = inside.sum(dim=1, keepdim=True).clamp(min=1) - 1
    return floor.index_put((index,), torch.maximum(lowest, values.gather(1, last)))


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first token [R] at which the running sum of weights [R, V] passes draw * total.

    Sums are float64, so that rounding moves no boundary that float32 logits could see.
    """
    rows, vocab_size = weights.shape
    best = weights.argmax(dim=1)
    padded = torch.nn.functional.pad(weights, (0, -vocab_size % _BLOCK))
    blocks = padded.view(rows, -1, _BLOCK)
    ends = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = draws[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    start = ends.gather(1, block) - blocks.sum(dim=2, dtype=torch.float64).gather(1, block)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(dim=1)
    offset = torch.searchsorted(inside, target - start, right=True).clamp(max=_BLOCK - 1)
    token = (block * _BLOCK + offset).clamp(max=vocab_size - 1)
    # Rounding at a block's end may point at a token without weight; then the best one is taken.
    return torch.where(weights.gather(1, token) > 0, token, best[:, None])[:, 0]


def _raw_logprobs(logits: torch.Tensor, sequences: list[SequenceState]) -> dict[int, torch.Tensor]:
    rows = [r for r, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, logits[rows].log_softmax(dim=1), strict=True))


def _logprobs(
    raw: dict[int, torch.Tensor], sequences: list[SequenceState], token_ids: list[int]
) -> dict[int, TokenLogprob]:
    return {
        row: token_logprobs(values[None], [token_ids[row]], sequences[row].sampling.logprobs or 0)[
            0
        ]
        for row, values in raw.items()
    }


def _beam_candidates(
    logits: torch.Tensor, sequences: list[SequenceState]
) -> dict[int, list[tuple[int, float]]]:
    """Twice the beam width: even if half of them end, the beam stays full."""
    return {
        row: best_tokens(
            logits[row : row + 1].log_softmax(dim=1), 2 * sequence.sampling.beam_width
        )[0]
        for row, sequence in enumerate(sequences)
        if sequence.sampling.beam_width > 1
    }
