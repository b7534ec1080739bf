"""Sampling parameters of one request; the text layer handles the strings, the engine the rest."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from chunkllama.errors import InvalidRequestError

MAX_SEED = 2**63 - 1


class ThinkingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Thoughts before the answer: a grammar holds from their end on.

    Attributes:
        is_open: the prompt has begun them; otherwise ``start_token_id`` begins them.
        start_token_id: None where the starting tag is no single token.
        end: text of the ending tag; ``end_token_ids`` are its tokens.
        budget: output tokens after which the ending tag is forced; None is no limit.
    """

    is_open: bool
    start_token_id: int | None
    end: str
    end_token_ids: tuple[int, ...]
    budget: int | None = None


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint on the output.

    ``kind`` is json_schema, json_object, regex, choice, lark, gbnf, or any, which constrains
    nothing but the thoughts; ``text`` is its source. ``has_calls``: a lark grammar is of calls,
    whose arguments are JSON. ``ends``: what ends raw text of it, each as texts and ids of tokens
    that no text has; an answer that runs out of tokens is closed with them.
    """

    kind: str
    text: str
    thinking: ThinkingSpec | None = None
    has_calls: bool = False
    ends: tuple[tuple[str | int, ...], ...] = ()

    @property
    def is_json(self) -> bool:
        """Whether a cut answer is useless, because it is JSON that does not end."""
        return self.has_calls or self.kind in ("json_schema", "json_object")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn and when a choice ends.

    Attributes:
        n: choices returned; of ``best_of`` >= n generated ones the best n by mean log-probability.
        temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1]. min_p in [0, 1].
        seed: 63-bit; None lets the client draw one before the request reaches the engine.
        max_tokens: None means as many as fit the context and the pool.
        stop: stop strings, or a single one (text layer). stop_token_ids end a choice as
            end-of-sequence does.
        logprobs: None is off; k >= 0 returns the sampled token's log-probability and the k best.
        prompt_logprobs: the same for the prompt's tokens.
        beam_width: > 1 is beam search with ``length_penalty``; temperature must then be 0.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    beam_width: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        def between(name: str, value: float, low: float, high: float) -> None:
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequestError(f"{name} must be in [{low}, {high}], got {value}", name)

        between("n", self.n, 1, 128)
        if self.best_of is not None and not self.n <= self.best_of <= 128:
            raise InvalidRequestError(
                f"best_of must be in [n={self.n}, 128], got {self.best_of}", "best_of"
            )
        between("temperature", self.temperature, 0.0, 100.0)
        between("top_p", self.top_p, 0.0, 1.0)
        between("top_k", self.top_k, -1, 2**31 - 1)
        between("min_p", self.min_p, 0.0, 1.0)
        between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        between("min_tokens", self.min_tokens, 0, 2**31 - 1)
        # A logit is divided by it: below this the quotient overflows float32.
        between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        between("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.seed is not None:
            between("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            between("max_tokens", self.max_tokens, 0, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}",
                    "min_tokens",
                )
        between("beam_width", self.beam_width, 1, 32)
        stop: Any = self.stop
        if isinstance(stop, str):
            msgspec.structs.force_setattr(self, "stop", (stop,))
        if self.beam_width > 1 and self.temperature != 0.0:
            raise InvalidRequestError("beam search needs temperature 0", "temperature")

    @property
    def num_sequences(self) -> int:
        """Sequences the engine runs for this request."""
        return self.best_of or self.n

    @property
    def num_choices(self) -> int:
        """Choices whose tokens the engine returns; beam search returns the best n beams."""
        return self.n if self.beam_width > 1 else self.num_sequences
