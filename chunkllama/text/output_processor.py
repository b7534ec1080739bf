"""Turn the engine's token deltas into text: detokenize, find stop strings, rank choices.

The offline API and the HTTP server both use this module, so that a request has the same text, stop
reasons and token counts in both.

The result does not depend on how the engine cuts its output into deltas: tokens are added one by
one, and tokens behind a stop string in the same delta are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from chunkllama.errors import RequestFailedError
from chunkllama.messages import (
    CacheExplanation,
    ChoiceDelta,
    EngineRequest,
    TokenDelta,
    TokenLogprob,
)
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.detokenizer import IncrementalDetokenizer, StopChecker
from chunkllama.text.thoughts import NO_THOUGHTS, Thoughts, ThoughtSplitter
from chunkllama.text.tokenizer import Tokenizer


@dataclass(slots=True)
class OutputDelta:
    """New text of one choice: complete characters, and the tokens that made them.

    Attributes:
        reasoning: new text of the model's thoughts, which stand before ``text``.
        finish_reason: set on the choice's last delta, which may carry no text.
        stop_reason: the stop string or the stop token id of the request that ended the choice;
            None when end-of-sequence or a length did.
        needs_abort: a stop string ended the choice, and the engine still generates it.
        branch: index of the branch whose text it is, where a choice has several.
        whole_text: text of the choice, on the last delta of one that has branches.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    needs_abort: bool = False
    branch: int | None = None
    whole_text: str | None = None

    def extend(self, other: OutputDelta) -> None:
        """Append a later delta of the same choice."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop_reason = other.stop_reason


class OutputProcessor:
    """Text of all choices of one request.

    Args:
        request: its sampling parameters name the stop strings; its prompt the text continues.
        tokenizer: decodes the tokens.
        continues_prompt: the text continues the prompt's (completions), rather than being a text
            of its own (chat).
        thoughts: how they are separated from the answer.

    Attributes:
        num_tokens: output tokens of all choices, up to the token that completes a stop string.
        num_reasoning_tokens: those of them that are thoughts or their tags.
        num_cached_tokens: prompt tokens whose K/V came from the cache.
        num_rounded_tokens: those of them whose K/V the tier has rounded.
        num_cache_write_tokens: prompt tokens whose K/V were added to the cache.
        num_accepted_predicted, num_rejected_predicted: tokens of the request's prediction that the
            engine has found right, and that it has computed and found wrong.
        explanation: why the prompt's match in the cache ended, if that was asked for.
        prompt_logprobs: log-probabilities of the prompt, once they have arrived.
        embedding: pooled hidden state of the prompt, once it has arrived.
    """

    def __init__(
        self,
        request: EngineRequest,
        tokenizer: Tokenizer,
        *,
        continues_prompt: bool,
        thoughts: Thoughts = NO_THOUGHTS,
    ) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.num_rounded_tokens = 0
        self.num_cache_write_tokens = 0
        self.num_accepted_predicted = 0
        self.num_rejected_predicted = 0
        self.explanation: CacheExplanation | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.embedding: list[float] | None = None
        self._choices = [
            _Choice(
                index,
                request.sampling,
                IncrementalDetokenizer(
                    tokenizer,
                    request.sampling.skip_special_tokens,
                    request.prompt_token_ids if continues_prompt else (),
                    thoughts.shown_ids,
                ),
                ThoughtSplitter(thoughts),
            )
            for index in range(request.sampling.num_choices)
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.is_finished for choice in self._choices)

    def add(self, delta: TokenDelta) -> list[OutputDelta]:
        """Return what the delta completes; deltas of a choice that has ended are ignored.

        Raises:
            RequestFailedError: the engine ended a choice without completing it.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.num_rounded_tokens = max(self.num_rounded_tokens, delta.num_rounded_tokens)
        self.num_cache_write_tokens = max(self.num_cache_write_tokens, delta.num_cache_write_tokens)
        self.num_accepted_predicted += delta.num_accepted_predicted
        self.num_rejected_predicted += delta.num_rejected_predicted
        self.explanation = self.explanation or delta.explanation
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.embedding = delta.embedding or self.embedding
        return [new for choice in delta.choices if (new := self._add(choice)) is not None]

    def _add(self, delta: ChoiceDelta) -> OutputDelta | None:
        if delta.index >= len(self._choices) or self._choices[delta.index].is_finished:
            return None
        if delta.finish_reason in ("abort", "error"):
            raise RequestFailedError("The engine ended this request", "engine_error")
        choice = self._choices[delta.index]
        before, thought = choice.num_tokens, choice.num_reasoning_tokens
        completed = choice.add(delta)
        self.num_tokens += choice.num_tokens - before
        self.num_reasoning_tokens += choice.num_reasoning_tokens - thought
        return completed


class OutputCollector:
    """Whole choices of one request, put together from deltas."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._n = sampling.n
        self._choices = [OutputDelta(index) for index in range(sampling.num_choices)]

    def add(self, deltas: Iterable[OutputDelta]) -> None:
        """Append deltas to their choices."""
        for delta in deltas:
            self._choices[delta.index].extend(delta)

    def result(self) -> list[OutputDelta]:
        """Return the choices; of ``best_of``, the n with the best mean log-probability.

        The earlier of two equally likely choices comes first.
        """
        if len(self._choices) == self._n:
            return self._choices
        best = sorted(self._choices, key=_mean_logprob, reverse=True)[: self._n]
        for index, choice in enumerate(best):
            choice.index = index
        return best


def with_ranking(sampling: SamplingParams) -> SamplingParams:
    """Ask the engine for the log-probabilities that ``best_of`` ranks choices by."""
    if sampling.num_choices > sampling.n and sampling.logprobs is None:
        return msgspec.structs.replace(sampling, logprobs=0)
    return sampling


def _mean_logprob(choice: OutputDelta) -> float:
    return sum(entry.logprob for entry in choice.logprobs) / max(len(choice.logprobs), 1)


class _Choice:
    """State of one choice; tokens are held until their characters are complete."""

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        thoughts: ThoughtSplitter,
    ) -> None:
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._thoughts = thoughts
        self._stop = StopChecker(sampling.stop, sampling.include_stop_str_in_output)
        self._held = OutputDelta(index)
        self.num_tokens = 0
        self._num_before_answer = 0
        self.is_finished = False

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of thoughts, with those of their tags."""
        return self._num_before_answer if self._thoughts.has_thoughts else 0

    def add(self, delta: ChoiceDelta) -> OutputDelta | None:
        """Return what the delta completes, or None while characters or stop strings are partial."""
        held = self._held
        matched = self._add_tokens(delta)
        if matched is None and delta.finish_reason is not None:
            matched = self._feed(self._detokenizer.finish(), is_last=True)
        if matched is not None:
            held.finish_reason, held.stop_reason = "stop", matched
            held.needs_abort = delta.finish_reason is None
        elif delta.finish_reason is not None:
            held.text += self._stop.flush()
            held.finish_reason = delta.finish_reason
            if delta.stop_token_id in self._sampling.stop_token_ids:
                held.stop_reason = delta.stop_token_id
        self.is_finished = held.finish_reason is not None
        if not held.text and not held.reasoning and not self.is_finished:
            return None
        self._held = OutputDelta(held.index)
        return held

    def _add_tokens(self, delta: ChoiceDelta) -> str | None:
        """Add tokens up to the one that completes a stop string; returns that string."""
        last = len(delta.token_ids) - 1
        for position, token_id in enumerate(delta.token_ids):
            self._held.token_ids.append(token_id)
            if delta.logprobs:
                self._held.logprobs.append(delta.logprobs[position])
            self.num_tokens += 1
            self._num_before_answer += not self._thoughts.is_answer
            ends = position == last and token_id == delta.stop_token_id
            if ends and not self._sampling.include_stop_str_in_output:
                continue
            matched = self._feed(self._detokenizer.add((token_id,)))
            if matched is not None:
                return matched
        return None

    def _feed(self, text: str, is_last: bool = False) -> str | None:
        """Add text; before ``min_tokens`` no stop string ends the choice, in thoughts none does."""
        thoughts, answer = self._thoughts.feed(text)
        if is_last:
            more_thoughts, more = self._thoughts.finish()
            thoughts, answer = thoughts + more_thoughts, answer + more
        self._held.reasoning += thoughts
        may_stop = self.num_tokens >= self._sampling.min_tokens
        emitted, matched = self._stop.feed(answer, may_stop=may_stop)
        self._held.text += emitted
        return matched
