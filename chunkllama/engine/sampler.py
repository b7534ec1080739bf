"""From logits to tokens, vectorised over the batch.

Order, as in vLLM: grammar, allowed tokens, bad words, min_tokens, bias, penalties, temperature,
min-p, top-k, top-p, draw. A row's draw depends on that row alone. The tokens are read from the
device once, and log-probabilities once more where they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.backends.base import Backend
from chunkllama.backends.draws import Draw, Upload
from chunkllama.engine.logprobs import best_tokens, candidates, token_logprobs
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.messages import TokenLogprob
from chunkllama.sampling_params import SamplingParams

_MIN_TEMPERATURE = 1e-5  # below it the scaled logits overflow; the draw is the best token anyway
_BROKEN, _NONE_ALLOWED = -1, -2  # instead of a token
_FAILURES = {_BROKEN: "model_nan", _NONE_ALLOWED: "no_allowed_token"}
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
        ops: draws the tokens. Where it has an ``arithmetic``, the weights of each row are computed
            by calls of their own: torch rounds some of the elements of a call otherwise than the
            rest.
        clock: seconds.
    """

    def __init__(
        self,
        eos_token_ids: Iterable[int],
        ops: Backend,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._ops = ops
        self._clock = clock

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
            masks: row -> grammar bit mask [ceil(V / 32)]; not changed.
        """
        top = logits.amax(dim=1)
        is_broken = ~top.isfinite()
        times = RowTimes(len(sequences), self._clock)
        raw = self._raw_logprobs(logits, sequences)
        times.charge(raw[0])
        if self._edit(logits, sequences, masks, times):
            top = logits.amax(dim=1)
        times.charge(())
        best = _beam_candidates(logits, sequences)
        times.charge([*best])
        tokens = self._choose(logits, sequences, times)
        told = tokens.masked_fill(top.isneginf(), _NONE_ALLOWED).masked_fill(is_broken, _BROKEN)
        # The first read waits for all that the device computes, the model's pass included.
        token_ids = told.tolist()
        times.charge(())
        beams = {
            row: [pair for pair in candidates(values)[0] if pair[1] > -np.inf]
            for row, values in best.items()
        }
        times.charge([*beams])
        logprobs = self._logprobs(raw, sequences, tokens)
        times.charge(raw[0])
        return [
            Sampled(
                max(token, 0),
                logprobs.get(row),
                beams.get(row),
                _FAILURES.get(token, ""),
                times.seconds[row],
            )
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
        masks = _with_allowed(masks, sequences, -(-vocab_size // 32), times)
        if logits.is_cuda:
            self._forbid(logits, masks)
            times.charge([*masks])
        else:  # torch would wake its other threads for each row
            for row, mask in masks.items():
                added = np.take(_BIAS_OF_BYTE, mask.view(np.uint8), axis=0).ravel()[:vocab_size]
                logits[row].numpy()[:] += added
                times.charge([row])
        additions = _Entries(vocab_size)
        for row, sequence in enumerate(sequences):
            for token in sequence.banned_ids(self._eos_token_ids):
                additions.add(row, token, -np.inf)
            for token, bias in sequence.sampling.logit_bias.items():
                additions.add(row, token, bias)
            times.charge([row])
        if additions:
            where, values = additions.tensors(self._ops.upload)
            logits.index_put_(where, values, accumulate=True)
            times.charge(additions.rows())
        penalised = [row for row, s in enumerate(sequences) if _is_penalised(s.sampling)]
        for row in penalised:
            _penalise(logits[row], sequences[row], self._ops.upload)
            times.charge([row])
        return bool(masks or additions or penalised)

    def _forbid(self, logits: torch.Tensor, masks: dict[int, NDArray[np.int32]]) -> None:
        """Let the masks' words say on the device which logits of their rows become -inf."""
        if not masks:
            return
        rows = self._ops.upload(np.array([*masks], np.int64))
        words = self._ops.upload(np.stack([*masks.values()]))
        bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
        forbidden = (bits & 1).view(len(masks), -1)[:, : logits.shape[1]] == 0
        logits.index_put_((rows,), logits[rows].masked_fill(forbidden, -torch.inf))

    def _choose(
        self, logits: torch.Tensor, sequences: list[SequenceState], times: RowTimes
    ) -> torch.Tensor:
        """The best token of greedy rows, a drawn one of the others: [N] int64.

        Overwrites the logits.
        """
        vocab_size = logits.shape[1]
        draws = [
            _draw_of(row, s, vocab_size)
            for row, s in enumerate(sequences)
            if s.sampling.temperature >= _MIN_TEMPERATURE
        ]
        # Those whose edge has to be searched for by themselves: it costs more than all the rest.
        groups = [[d for d in draws if d.cuts == cuts] for cuts in (False, True)]
        if self._ops.arithmetic:
            groups = [[draw] for draw in draws]
        if draws in groups and len(draws) == len(sequences):
            tokens = self._ops.draw(logits, draws)
            times.charge(range(len(draws)))
            return tokens
        tokens = logits.argmax(dim=1)
        times.charge(())
        for group in filter(None, groups):
            rows = [draw.row for draw in group]
            drawn = self._ops.draw(logits, group)
            tokens = tokens.index_put((self._ops.upload(np.array(rows, np.int64)),), drawn)
            times.charge(rows)
        return tokens

    def _raw_logprobs(
        self, logits: torch.Tensor, sequences: list[SequenceState]
    ) -> tuple[list[int], torch.Tensor | None]:
        """The rows whose log-probabilities are wanted, and log-softmax of their unedited logits."""
        rows = [r for r, s in enumerate(sequences) if s.sampling.logprobs is not None]
        if not rows:
            return rows, None
        return rows, self._rows_of(logits, rows).log_softmax(dim=1)

    def _logprobs(
        self,
        raw: tuple[list[int], torch.Tensor | None],
        sequences: list[SequenceState],
        tokens: torch.Tensor,
    ) -> dict[int, TokenLogprob]:
        rows, values = raw
        if values is None:
            return {}
        num_top = [sequences[row].sampling.logprobs or 0 for row in rows]
        return dict(
            zip(rows, token_logprobs(values, self._rows_of(tokens, rows), num_top), strict=True)
        )

    def _rows_of(self, values: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """These rows of values; without a copy where they are all."""
        return values if len(rows) == len(values) else values[self._ops.upload(np.array(rows))]


def _with_allowed(
    masks: dict[int, NDArray[np.int32]],
    sequences: list[SequenceState],
    num_words: int,
    times: RowTimes,
) -> dict[int, NDArray[np.int32]]:
    """Return the grammars' masks [num_words] and the requests' own, both where a row has both."""
    found = dict(masks)
    for row, sequence in enumerate(sequences):
        allowed = sequence.allowed_mask(num_words)
        if allowed is not None:
            found[row] = allowed & found[row] if row in found else allowed
            times.charge([row])
    return found


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

    def tensors(self, upload: Upload) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        rows, columns = upload(np.array([self._rows, self._columns], np.int64))
        return (rows, columns), upload(np.array(self._values, np.float32))


def _penalise(logits: torch.Tensor, sequence: SequenceState, upload: Upload) -> None:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858), frequency and presence over the
    output (OpenAI's definition), in a row of logits [V].
    """
    sampling = sequence.sampling
    output, counts = np.unique(np.array(sequence.output_token_ids, np.int64), return_counts=True)
    if sampling.repetition_penalty != 1.0:
        seen = np.union1d(sequence.prompt_token_ids, output)
        ids = upload(seen.astype(np.int64))
        values, factor = logits[ids], sampling.repetition_penalty
        logits[ids] = torch.where(values > 0, values / factor, values * factor)
    penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
    logits[upload(output)] -= upload(penalty.astype(np.float32))


def _draw_of(row: int, sequence: SequenceState, vocab_size: int) -> Draw:
    sampling = sequence.sampling
    return Draw(
        row=row,
        seed=sampling.seed or 0,
        choice=sequence.index,
        position=len(sequence.output_token_ids),
        temperature=sampling.temperature,
        top_k=sampling.top_k if 0 < sampling.top_k < vocab_size else 0,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def _beam_candidates(
    logits: torch.Tensor, sequences: list[SequenceState]
) -> dict[int, torch.Tensor]:
    """What ``candidates`` reads, of twice the beam width: even if half of them end, the beam stays
    full.
    """
    return {
        row: best_tokens(logits[row : row + 1].log_softmax(dim=1), 2 * s.sampling.beam_width)
        for row, s in enumerate(sequences)
        if s.sampling.beam_width > 1
    }
