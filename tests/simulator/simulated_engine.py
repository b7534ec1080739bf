"""Scheduler, tree and pool under a fake model, a virtual clock and a seed: no tensors, no time.

The fake model keeps a number for every (chunk, slot), as the real one keeps K and V. The number at
position p is a hash of the token there and of *every* number read at positions before it, so one
wrong, stale or unfilled slot anywhere changes all that follows. The oracle computes the same
function from the tokens alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
from fairness_monitor import FairnessMonitor

from chunkllama.cache.manager import CacheManager
from chunkllama.messages import EngineRequest, TokenDelta, TokenLogprob
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import NewSequence, SampledTokens, SchedulerOutput
from chunkllama.scheduler.scheduler import Scheduler

MAX_POSITIONS = 16384
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, MAX_POSITIONS, dtype=np.uint64) | np.uint64(
    1
)
_MASK = 2**64 - 1


def _mix(read: int, token_id: int, position: int) -> int:
    x = (read ^ (token_id + 1) * 0x9E3779B97F4A7C15 ^ (position + 1) * 0xC2B2AE3D27D4EB4F) & _MASK
    x = ((x ^ (x >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
    return x ^ (x >> 32)


def _value(history: np.ndarray, token_id: int) -> int:
    """The number of a position, from the numbers of all earlier ones."""
    position = len(history)
    read = int(np.dot(history, _WEIGHTS[:position])) if position else 0
    return _mix(read, token_id, position)


def sample(value: int, vocab_size: int, index: int) -> int:
    """The next token: a function of the last number and of which choice it is."""
    return ((value >> 7) + index * (value >> 31)) % vocab_size


def logprob(value: int) -> float:
    """A fingerprint of the whole history beside each token: two tokens alone may agree by luck."""
    return -float(value >> 11) / 2**53


def candidates(value: int, vocab_size: int, width: int) -> list[tuple[int, float]]:
    """Distinct tokens with made-up log-probabilities, best first."""
    first = value % vocab_size
    untie = (value >> 13) % 1_000_003 * 1e-9
    return [
        ((first + i) % vocab_size, -0.1 - untie - i * (0.05 + (value >> (i + 8)) % 97 / 97))
        for i in range(min(2 * width, vocab_size))
    ]


class FakeModel:
    """An executor over one number per slot of the pool."""

    def __init__(self, num_chunks: int, chunk_size: int, vocab_size: int) -> None:
        self.chunk_size = chunk_size
        self.vocab_size = vocab_size
        self.kv = np.random.default_rng(0).integers(
            0, 2**63, num_chunks * chunk_size, dtype=np.uint64
        )
        self.sequences: dict[int, NewSequence] = {}
        self.fail_slots: set[int] = set()
        self._offsets = np.arange(chunk_size)

    def prepare(self, sampling: SamplingParams) -> None:
        """Nothing."""

    def execute(self, output: SchedulerOutput) -> SampledTokens:
        for slot in output.freed_slots:
            del self.sequences[slot]
        for new in output.new_sequences:
            assert new.slot not in self.sequences, "a slot was given twice"
            self.sequences[new.slot] = new
        self._copy(output.copies)
        sampled = SampledTokens(token_ids={})
        values = self._compute(output)
        for piece in output.slices:
            if piece.slot in self.fail_slots:
                sampled.failed[piece.slot] = "model_nan"
            else:
                self._sample(sampled, piece, values[piece.slot])
        return sampled

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
            value = _value(kv[where[:position]], token_id)
            if slot in self.fail_slots:
                value ^= 0x5A5A5A5A5A5A  # what a failing sequence writes is garbage
            kv[where[position]] = value
            values[slot].append(value)
        return values

    def _sample(self, sampled: SampledTokens, piece, values: list[int]) -> None:
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
        value = values[-1]
        width = sequence.sampling.beam_width
        if width > 1:
            sampled.beam_candidates[piece.slot] = candidates(value, self.vocab_size, width)
        sampled.token_ids[piece.slot] = sample(value, self.vocab_size, sequence.index)
        sampled.logprobs[piece.slot] = TokenLogprob(0, logprob(value), 1, [])


class Oracle:
    """What each request must yield, computed from its tokens alone."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._values: dict[tuple[int, ...], np.ndarray] = {}

    def numbers(self, tokens: Iterable[int]) -> list[int]:
        """The number of every position."""
        tokens = list(tokens)
        values = np.empty(len(tokens), np.uint64)
        for i, token_id in enumerate(tokens):
            values[i] = _value(values[:i], token_id)
        return values.tolist()

    def choice(
        self, prompt: list[int], sampling: SamplingParams, max_tokens: int, index: int
    ) -> tuple[list[int], list[float], str]:
        """Tokens, fingerprints and finish reason of one choice."""
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
            values[at] = _value(values[:at], token_id)
        return tokens, prints, "length"

    def beams(
        self, prompt: list[int], sampling: SamplingParams, max_tokens: int
    ) -> list[tuple[list[int], str]]:
        """The n best hypotheses of a beam search over plain token lists."""
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

    def _prompt_values(self, prompt: tuple[int, ...]) -> np.ndarray:
        if prompt not in self._values:
            self._values[prompt] = np.array(self.numbers(prompt), np.uint64)
        return self._values[prompt]


LIMITS: dict[str, object] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "max_model_len": 8192,
    "max_waiting": 256,
    "policy": "fair",
    "fair_quantum": 8192,
    "min_wait_tokens": 32,
    "enable_prefix_caching": True,
}


class SimulatedEngine:
    """A whole engine without tensors: add, step, abort, and compare with the oracle."""

    def __init__(
        self,
        num_chunks: int,
        chunk_size: int,
        *,
        vocab_size: int = 2,
        check: bool = True,
        make_cache: type[CacheManager] = CacheManager,
        make_scheduler: type[Scheduler] = Scheduler,
        **limits: object,
    ) -> None:
        self.now = 0.0
        self.check = check
        self.limits = SchedulerLimits(**{**LIMITS, **limits})
        self.cache = make_cache(num_chunks, chunk_size, self.clock)
        self.scheduler = make_scheduler(self.limits, self.cache, self.clock)
        self.monitor = FairnessMonitor(self.scheduler)
        self.model = FakeModel(num_chunks, chunk_size, vocab_size)
        self.oracle = Oracle(vocab_size, self.limits.eos_token_ids)
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.prints: dict[tuple[str, int], list[float]] = {}
        self.finished: dict[tuple[str, int], str] = {}
        self.errors: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.first_deltas: dict[str, TokenDelta] = {}
        self.last_output: SchedulerOutput | None = None
        self.num_steps = 0
        self.random = random.Random(0)

    def clock(self) -> float:
        return self.now

    def add(self, prompt: list[int], max_tokens: int | None = 4, **options: object) -> str:
        """Queue a request; options belong to EngineRequest or else to SamplingParams."""
        name = f"r{len(self.requests)}"
        own = {k: v for k, v in options.items() if k in EngineRequest.__struct_fields__}
        params = {k: v for k, v in options.items() if k not in own}
        sampling = SamplingParams(
            max_tokens=max_tokens, **{"seed": 1, "temperature": 0.0, **params}
        )
        request = EngineRequest(
            request_id=name, prompt_token_ids=list(prompt), sampling=sampling, **own
        )
        self.scheduler.add(request)
        self.requests[name] = request
        for index in range(sampling.num_sequences):
            self.outputs[name, index] = []
            self.prints[name, index] = []
        return name

    def schedule(self) -> SchedulerOutput | None:
        self.last_output = self.scheduler.schedule()
        if self.check:
            self.scheduler.check_invariants()
        return self.last_output

    def commit(self) -> list[TokenDelta]:
        output = self.last_output
        assert output is not None
        self.last_output = None
        deltas = self.scheduler.commit(output, self.model.execute(output))
        for delta in deltas:
            self._take(delta)
        if self.check:
            self.scheduler.check_invariants()
        self.num_steps += 1
        self.now += 0.01
        return deltas

    def step(self) -> list[TokenDelta]:
        """One whole step; [] if there was nothing to do."""
        return [] if self.schedule() is None else self.commit()

    def run(self, max_steps: int = 100_000) -> None:
        """Until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished():
                break
            before = self.num_steps
            self.step()
            assert self.num_steps > before, "deadlock: work is left and nothing is scheduled"
        assert not self.scheduler.has_unfinished(), "still running"
        self.check_idle()

    def _take(self, delta: TokenDelta) -> None:
        name = delta.request_id
        if delta.error is not None:
            self.errors[name] = delta.error.code or ""
            return
        self.first_deltas.setdefault(name, delta)
        self.cached.setdefault(name, delta.num_cached_tokens)
        self.written.setdefault(name, delta.num_cache_write_tokens)
        for choice in delta.choices:
            key = name, choice.index
            assert key not in self.finished, "a delta after the last one"
            self.outputs.setdefault(key, []).extend(choice.token_ids)
            self.prints.setdefault(key, []).extend(e.logprob for e in choice.logprobs or [])
            if choice.finish_reason is not None:
                self.finished[key] = choice.finish_reason

    def check_idle(self) -> None:
        """Nothing runs: nothing is referenced or private, and the pool adds up."""
        self.scheduler.check_invariants()
        stats = self.scheduler.stats()
        assert stats.chunks_referenced == stats.chunks_private == 0
        assert stats.chunks_free + stats.chunks_cached == stats.chunks_total

    def check_outputs(self, aborted: Iterable[str | tuple[str, int]] = ()) -> None:
        """Every request's outputs are the oracle's; aborted and failed ones got a prefix.

        Args:
            aborted: requests, or choices as (request, index).
        """
        aborted = {*aborted, *self.errors}
        for name, request in self.requests.items():
            sampling = request.sampling
            if sampling.beam_width > 1:
                if name not in aborted:
                    self._check_beams(name)
                continue
            if request.wants_hidden_states:
                if name not in aborted:
                    last = self.oracle.numbers(request.prompt_token_ids)[-1]
                    assert self.first_deltas[name].embedding == [logprob(last)]
                continue
            if sampling.prompt_logprobs is not None and name in self.first_deltas:
                self._check_prompt_logprobs(name)
            for index in range(sampling.num_sequences):
                is_whole = name not in aborted and (name, index) not in aborted
                self._check_choice(name, index, is_whole=is_whole)

    def _check_beams(self, name: str) -> None:
        request = self.requests[name]
        sampling = request.sampling
        assert sampling.max_tokens is not None
        expected = self.oracle.beams(request.prompt_token_ids, sampling, sampling.max_tokens)
        got = [(self.outputs[name, i], self.finished[name, i]) for i in range(sampling.n)]
        assert got == expected, f"{name}: beams differ"

    def _check_prompt_logprobs(self, name: str) -> None:
        prompt = self.requests[name].prompt_token_ids
        numbers = self.oracle.numbers(prompt)
        entries = self.first_deltas[name].prompt_logprobs
        assert entries is not None and entries[0] is None
        assert [e.logprob for e in entries[1:]] == [logprob(v) for v in numbers[:-1]]

    def _check_choice(self, name: str, index: int, *, is_whole: bool) -> None:
        request = self.requests[name]
        prompt, sampling = request.prompt_token_ids, request.sampling
        limit = sampling.max_tokens
        if limit is None:
            pool = self.cache.num_chunks * self.cache.chunk_size + 1
            limit = min(self.limits.max_model_len, pool) - len(prompt)
        tokens, prints, reason = self.oracle.choice(prompt, sampling, limit, index)
        got, got_prints = self.outputs[name, index], self.prints[name, index]
        skip = len(request.delivered[index]) if index < len(request.delivered) else 0
        if is_whole:
            assert (name, index) in self.finished, f"{name}/{index} never ended"
        if (name, index) in self.finished:
            assert got == tokens[skip:], f"{name}/{index}: {got} is not {tokens[skip:]}"
            assert got_prints == prints[skip:], f"{name}/{index} read wrong K/V"
            assert self.finished[name, index] == reason
        else:
            assert got == tokens[skip : skip + len(got)]
            assert got_prints == prints[skip : skip + len(got)]
