"""From logits to tokens, vectorised over the batch.

Order, as in vLLM: grammar, allowed tokens, bad words, min_tokens, bias, penalties, temperature,
min-p, top-k, top-p, draw. A row's draw depends on that row alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.engine.logprobs import token_logprobs, top_tokens
from chunkllama.engine.philox import gumbels
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.messages import TokenLogprob
from chunkllama.sampling_params import SamplingParams

_MIN_TEMPERATURE = 1e-5  # below it the scaled logits overflow; the draw is the best token anyway
_LOG2E = math.log2(math.e)
_BLOCK = 256  # a draw chooses a block of tokens first, then one of its tokens
# [256, 8]: bias of the eight tokens of a mask's byte; adding it is far faster than filling.
_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    np.float32(-np.inf),
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome; ``failed`` is a reason instead of a token.

    ``seconds`` is what the row has cost beyond the best of its logits; work on several rows at once
    is divided evenly among those that asked for it.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    beam_candidates: list[tuple[int, float]] | None = None
    failed: str = ""
    seconds: float = field(default=0.0, compare=False)


class RowTimes:
    """Divides the time of a step's sampling among its rows.

    Attributes:
        seconds: of each row so far.
    """

    def __init__(self, num_rows: int, clock: Callable[[], float]) -> None:
        self.seconds = [0.0] * num_rows
        self._clock = clock
        self._last = clock()

    def charge(self, rows: Sequence[int]) -> None:
        """Charge the time since the last call to ``rows``; without rows it is charged to no row."""
        now = self._clock()
        passed, self._last = now - self._last, now
        for row in rows:
            self.seconds[row] += passed / len(rows)


class Sampler:
    """Draws one token per row.

    Args:
        eos_token_ids: what ``min_tokens`` suppresses in addition to a request's own stop tokens.
        clock: seconds.
        draws_alone: compute the weights of each row by calls of its own: torch rounds some of the
            elements of a call otherwise than the rest.
    """

    def __init__(
        self,
        eos_token_ids: Iterable[int],
        clock: Callable[[], float] = time.perf_counter,
        *,
        draws_alone: bool = False,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._clock = clock
        self._draws_alone = draws_alone

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
        top = logits.amax(dim=1)
        broken = ~top.isfinite()
        if bool(broken.any()):
            logits[broken] = 0.0
            top[broken] = 0.0
        times = RowTimes(len(sequences), self._clock)
        raw = _raw_logprobs(logits, sequences)
        times.charge(raw[0])
        if self._edit(logits, sequences, masks, times):
            top = logits.amax(dim=1)
        empty = top.isneginf()
        times.charge(())
        beams = _beam_candidates(logits, sequences)
        times.charge([*beams])
        token_ids = _choose(logits, top, sequences, times, self._draws_alone)
        logprobs = _logprobs(raw, sequences, token_ids)
        times.charge(raw[0])
        failed = [
            "model_nan" if is_broken else "no_allowed_token" if is_empty else ""
            for is_broken, is_empty in zip(broken.tolist(), empty.tolist(), strict=True)
        ]
        return [
            Sampled(token, logprobs.get(row), beams.get(row), failed[row], times.seconds[row])
            for row, token in enumerate(token_ids)
        ]

    def _edit(
        self,
        logits: torch.Tensor,
        sequences: list[SequenceState],
        masks: dict[int, NDArray[np.int32]],
        times: RowTimes,
    ) -> bool:
        """Apply masks, bans, bias and penalties; report whether any logit was edited."""
        vocab_size = logits.shape[1]
        for row, mask in masks.items():
            added = np.take(_BIAS_OF_BYTE, mask.view(np.uint8), axis=0).ravel()[:vocab_size]
            if logits.is_cuda:
                logits[row] += torch.from_numpy(added).to(logits.device)
            else:  # torch would wake its other threads for each row
                logits[row].numpy()[:] += added
            times.charge([row])
        additions = _Entries(vocab_size)
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if sampling.allowed_token_ids:
                ids = sequence.allowed_ids(vocab_size, logits.device)
                kept = logits[row, ids]
                logits[row] = -torch.inf
                logits[row, ids] = kept
            for token in sequence.banned_ids(self._eos_token_ids):
                additions.add(row, token, -np.inf)
            for token, bias in sampling.logit_bias.items():
                additions.add(row, token, bias)
            times.charge([row])
        if additions:
            where, values = additions.tensors(logits.device)
            logits.index_put_(where, values, accumulate=True)
            times.charge(additions.rows())
        penalised = [row for row, s in enumerate(sequences) if _is_penalised(s.sampling)]
        for row in penalised:
            _penalise(logits[row], sequences[row])
            times.charge([row])
        restricted = any(sequence.sampling.allowed_token_ids for sequence in sequences)
        return bool(masks or additions or penalised or restricted)


def takes_best(sampling: SamplingParams) -> bool:
    """Report whether the request needs only the token of the largest logit at each step."""
    can_forbid = sampling.bad_words_token_ids or (
        sampling.min_tokens > 0 and (sampling.stop_token_ids or not sampling.ignore_eos)
    )
    return (
        sampling.temperature < _MIN_TEMPERATURE
        and sampling.logprobs is None
        and sampling.beam_width == 1
        and sampling.grammar is None
        and not _is_penalised(sampling)
        and not sampling.logit_bias
        and not sampling.allowed_token_ids
        and not can_forbid
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

    def rows(self) -> list[int]:
        """The rows that have entries."""
        return sorted(set(self._rows))

    def tensors(
        self, device: torch.device
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        rows, columns = torch.tensor([self._rows, self._columns], device=device)
        return (rows, columns), torch.tensor(self._values, device=device)


def _penalise(logits: torch.Tensor, sequence: SequenceState) -> None:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858), frequency and presence over the
    output (OpenAI's definition), in a row of logits [V].
    """
    sampling = sequence.sampling
    output, counts = np.unique(np.array(sequence.output_token_ids, np.int64), return_counts=True)
    if sampling.repetition_penalty != 1.0:
        seen = np.union1d(sequence.prompt_token_ids, output)
        ids = torch.from_numpy(seen.astype(np.int64)).to(logits.device)
        values, factor = logits[ids], sampling.repetition_penalty
        logits[ids] = torch.where(values > 0, values / factor, values * factor)
    penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
    ids = torch.from_numpy(output).to(logits.device)
    logits[ids] -= torch.from_numpy(penalty).to(logits.device, torch.float32)


def _choose(
    logits: torch.Tensor,
    top: torch.Tensor,
    sequences: list[SequenceState],
    times: RowTimes,
    draws_alone: bool,
) -> list[int]:
    """The best token of greedy rows, a drawn one of the others.

    logits [N, V], whose maxima are top [N], are overwritten.
    """
    drawing = [r for r, s in enumerate(sequences) if s.sampling.temperature >= _MIN_TEMPERATURE]
    if len(drawing) == len(sequences) and not draws_alone:
        return _ids(_draw(logits, top, sequences, drawing, times))
    tokens = logits.argmax(dim=1)
    times.charge(())
    for together in filter(None, [[row] for row in drawing] if draws_alone else [drawing]):
        rows = torch.tensor(together, device=logits.device)
        states = [sequences[row] for row in together]
        drawn = _draw(logits[rows], top[rows], states, together, times)
        tokens = tokens.index_put((rows,), drawn)
    return _ids(tokens)


def _ids(tokens: torch.Tensor) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids


def _draw(
    logits: torch.Tensor,
    top: torch.Tensor,
    sequences: list[SequenceState],
    rows: list[int],
    times: RowTimes,
) -> torch.Tensor:
    """Token ids [R] drawn from logits [R, V] (overwritten); top [R] are their maxima.

    Where several tokens tie at the edge of a top-k or top-p set, all of them are in it. ``rows``
    [R] are the rows that ``times`` knows them by.
    """
    sampling = [sequence.sampling for sequence in sequences]
    device = logits.device
    logits -= torch.where(top.isfinite(), top, 0.0)[:, None]
    # Base 2, because torch's exp takes ten times as long where the result is 0 or nearly.
    scale = [[_LOG2E / s.temperature] for s in sampling]
    logits *= torch.tensor(scale, dtype=torch.float32, device=device)
    weights = logits.exp2_()  # the best token's is 1
    edge = torch.tensor([[s.min_p] for s in sampling], dtype=torch.float32, device=device)
    times.charge(rows)
    cut = [i for i, s in enumerate(sampling) if s.top_p < 1.0 or 0 < s.top_k < weights.shape[1]]
    if cut:
        some = slice(None) if len(cut) == len(rows) else torch.tensor(cut, device=device)
        edge[some] = _edges(weights[some], edge[some], [sampling[i] for i in cut])
        times.charge([rows[i] for i in cut])
    if bool(edge.any()):
        weights.masked_fill_(weights < edge, 0.0)
    drawn = _race(weights, sequences)
    times.charge(rows)
    return drawn


def _edges(
    weights: torch.Tensor, edge: torch.Tensor, sampling: list[SamplingParams]
) -> torch.Tensor:
    """The smallest weight [R, 1] that each row may draw: min-p (``edge`` [R, 1]), then top-k, then
    the smallest set, best first, that holds top_p of what is left (nucleus sampling, arXiv
    1904.09751).
    """
    device, vocab_size = weights.device, weights.shape[1]
    top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in sampling]
    falling = _sort_falling(weights)
    last = torch.tensor(top_k, device=device)[:, None] - 1
    edge = torch.maximum(edge, falling.gather(1, last))
    sums = falling.cumsum(dim=1, dtype=torch.float64)
    # At least one: a row in which every token is forbidden is reported, not drawn from.
    num_left = torch.searchsorted(-falling, -edge, right=True).clamp(min=1)
    share = torch.tensor([[s.top_p] for s in sampling], dtype=torch.float64, device=device)
    last = torch.searchsorted(sums, share * sums.gather(1, num_left - 1))
    nucleus = torch.maximum(edge, falling.gather(1, last.clamp(max=vocab_size - 1)))
    return torch.where(share < 1.0, nucleus, edge)


def _sort_falling(weights: torch.Tensor) -> torch.Tensor:
    if weights.is_cuda:
        return weights.sort(dim=1, descending=True).values
    # numpy sorts with vector instructions: 2 ms for 16 rows of 49,152, where torch takes 129.
    return torch.from_numpy(np.sort(-weights.numpy(), axis=1)).neg_()


def _race(weights: torch.Tensor, sequences: list[SequenceState]) -> torch.Tensor:
    """A token [R] per row with probability proportional to its weight [R, V], by Gumbel-max.

    First a block of neighbouring tokens by its sum, then a token of the block: the largest
    log(weight) + Gumbel number wins. A small error of the weights changes the winner only near a
    tie, where inversion of the running sum would move every boundary after it.
    """
    vocab_size, device = weights.shape[1], weights.device
    padding = -vocab_size % _BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(len(weights), -1, _BLOCK)
    seeds = [sequence.sampling.seed or 0 for sequence in sequences]
    choices = [sequence.index for sequence in sequences]
    positions = [len(sequence.output_token_ids) for sequence in sequences]

    def numbers(stream: int, lanes: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(gumbels(seeds, choices, positions, stream, lanes)).to(device)

    count = blocks.shape[1]
    lanes = np.broadcast_to(np.arange(-(-count // 4)), (len(weights), -(-count // 4)))
    block = (blocks.sum(dim=2).log() + numbers(0, lanes)[:, :count]).argmax(dim=1)
    inside = blocks[torch.arange(len(weights), device=device), block]
    lanes = block.cpu().numpy()[:, None] * (_BLOCK // 4) + np.arange(_BLOCK // 4)
    token = block * _BLOCK + (inside.log() + numbers(1, lanes)).argmax(dim=1)
    return token.clamp(max=vocab_size - 1)  # of a row without weights, which is reported


def _raw_logprobs(
    logits: torch.Tensor, sequences: list[SequenceState]
) -> tuple[list[int], torch.Tensor | None]:
    """The rows whose log-probabilities are wanted, and log-softmax of their unedited logits."""
    rows = [r for r, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if not rows:
        return rows, None
    return rows, (logits if len(rows) == len(sequences) else logits[rows]).log_softmax(dim=1)


def _logprobs(
    raw: tuple[list[int], torch.Tensor | None],
    sequences: list[SequenceState],
    token_ids: list[int],
) -> dict[int, TokenLogprob]:
    rows, values = raw
    if values is None:
        return {}
    num_top = [sequences[row].sampling.logprobs or 0 for row in rows]
    entries = token_logprobs(values, [token_ids[row] for row in rows], num_top)
    return dict(zip(rows, entries, strict=True))


def _beam_candidates(
    logits: torch.Tensor, sequences: list[SequenceState]
) -> dict[int, list[tuple[int, float]]]:
    """Twice the beam width: even if half of them end, the beam stays full. Only allowed tokens."""
    candidates = {}
    for row, sequence in enumerate(sequences):
        width = sequence.sampling.beam_width
        if width > 1:
            best = top_tokens(logits[row : row + 1].log_softmax(dim=1), 2 * width)[0]
            candidates[row] = [(token, logprob) for token, logprob in best if logprob > -np.inf]
    return candidates
