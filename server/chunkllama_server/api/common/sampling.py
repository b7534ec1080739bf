"""Convert request fields to SamplingParams, with the checks that need the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from chunkllama.messages import BACKGROUND_PRIORITY, EngineReady
from chunkllama.sampling_params import GrammarSpec, SamplingParams
from chunkllama.text.output_processor import with_ranking
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.schema.base import SamplingFields
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.errors import exceeded, invalid

T = TypeVar("T")

BATCH_PRIORITY = BACKGROUND_PRIORITY  # of a batch's lines: behind every other request
# Answers end long before a large context is full, which would refuse two choices with 20
# log-probabilities each.
_USUAL_TOKENS = 1 << 14
PRIORITY_OF_TIER = {"flex": 10, "priority": -10, "fast": -10}


def request_priority(
    priority: int | None, service_tier: str | None, tenant: str, highest: int
) -> int:
    """Priority of a request; lower is served first among the requests of its tenant.

    Args:
        tenant: the API key's tenant; "" may use every priority.
        highest: the lowest number that a request with an API key may carry.

    Raises:
        ApiError: 400 for a priority above the key's highest.
    """
    if tenant and priority is not None and priority < highest:
        raise invalid(
            f"priority must be at least {highest} with this API key, got {priority}", "priority"
        )
    value = (priority or 0) + PRIORITY_OF_TIER.get(service_tier or "auto", 0)
    return max(value, highest) if tenant else value


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def check_prompt_ids(ids: list[int], info: EngineReady, param: str) -> None:
    """Refuse an empty prompt or an id outside the vocabulary; ``check_lengths`` refuses a long one.

    Raises:
        ApiError: 400.
    """
    if not ids:
        raise invalid("The prompt is empty", param)
    fitting = ids[: info.max_request_tokens]
    largest = max(fitting)
    if largest >= info.vocab_size or min(fitting) < 0:
        raise invalid(f"Token id {largest} is outside the vocabulary of {info.vocab_size}", param)


def num_logprobs(prompt_tokens: int, output_tokens: int, sampling: SamplingParams) -> int:
    """Return how many log-probabilities an answer holds.

    Args:
        prompt_tokens: of all prompts.
        output_tokens: of all choices.
    """
    found = 0
    if sampling.logprobs is not None:
        found += output_tokens * (1 + sampling.logprobs)
    if sampling.prompt_logprobs is not None:
        found += prompt_tokens * (1 + sampling.prompt_logprobs)
    return found


def check_num_logprobs(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, room: int, limits: LimitsConfig
) -> None:
    """Refuse an answer that would be kept with more log-probabilities than the limit.

    One sequence is bounded by the context.

    Args:
        room: output tokens that fit into a choice; one that the request does not limit is taken to
            have ``_USUAL_TOKENS`` at most.

    Raises:
        ApiError: 400.
    """
    num_choices = len(prompts) * sampling.num_sequences
    if num_choices == 1:
        return
    most = min(room, _USUAL_TOKENS) if sampling.max_tokens is None else sampling.max_tokens
    output_tokens = num_choices * most
    value = num_logprobs(sum(map(len, prompts)), output_tokens, sampling)
    if value > limits.max_answer_logprobs:
        param = "prompt_logprobs" if sampling.logprobs is None else "logprobs"
        raise exceeded(limits, "max_answer_logprobs", param, value=value)


def check_lengths(
    prompt_tokens: int, max_tokens: int | None, info: EngineReady, prompt_param: str, param: str
) -> None:
    """Refuse what the context cannot hold, naming both numbers.

    Raises:
        ApiError: 400 with code context_length_exceeded.
    """
    limit = info.max_request_tokens
    least = 0 if max_tokens == 0 else 1
    if prompt_tokens + least > limit:
        raise invalid(
            f"At most {limit} tokens fit ({_what_limits(info)}), but the prompt has "
            f"{prompt_tokens}, which leaves none for the answer",
            prompt_param,
            "context_length_exceeded",
        )
    if max_tokens is not None and prompt_tokens + max_tokens > limit:
        raise invalid(
            f"At most {limit} tokens fit ({_what_limits(info)}), but the request asks for "
            f"{prompt_tokens + max_tokens} ({prompt_tokens} in the prompt, {max_tokens} in the "
            "answer)",
            param,
            "context_length_exceeded",
        )


def _what_limits(info: EngineReady) -> str:
    context = f"this model's maximum context length is {info.max_model_len} tokens"
    if info.max_request_tokens >= info.max_model_len:
        return context
    return f"{context}, the server's K/V pool holds {info.num_chunks * info.chunk_size}"


def parse_logit_bias(body: SamplingFields, vocab_size: int) -> dict[int, float]:
    """Parse logit_bias.

    Raises:
        ApiError: 400 for a key that is not a token id of this model.
    """
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise invalid(f"logit_bias key {key[:50]!r} is not a token id", "logit_bias")
        if int(key) >= vocab_size:
            raise invalid(
                f"logit_bias key {key} is outside the vocabulary of {vocab_size}", "logit_bias"
            )
        bias[int(key)] = float(value)
    return bias


def parse_bad_words(words: list[str] | None, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Encode each word as at the start of a text and as after a space."""
    sequences = []
    for word in words or ():
        for spelled in (word, f" {word}"):
            ids = tuple(tokenizer.encode(spelled))
            if ids and ids not in sequences:
                sequences.append(ids)
    return tuple(sequences)


def _check_token_ids(ids: list[int] | None, vocab_size: int, param: str) -> tuple[int, ...]:
    for position, token_id in enumerate(ids or ()):
        if token_id >= vocab_size:
            raise invalid(
                f"Token id {token_id} is outside the vocabulary of {vocab_size}",
                f"{param}[{position}]",
            )
    return tuple(ids or ())


def stop_strings(body: SamplingFields) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _temperature(body: SamplingFields, defaults: Mapping[str, Any]) -> float:
    if body.use_beam_search:
        if body.temperature:
            raise invalid("Beam search needs temperature 0", "temperature")
        return 0.0
    return float(_or(body.temperature, defaults.get("temperature", 1.0)))


def check_beam_search(n: int, logprobs: int | None, grammar: GrammarSpec | None) -> None:
    """Refuse too many beams, and what beam search cannot be combined with.

    Raises:
        ApiError: 400.
    """
    if n > 32:
        raise invalid(f"Beam search takes at most 32 beams, got n = {n}", "n")
    if logprobs is not None:
        raise invalid("Beam search returns no log-probabilities", "logprobs")
    if grammar is not None:
        raise invalid("Beam search excludes structured output", "use_beam_search")


def sampling_params(
    body: SamplingFields,
    defaults: Mapping[str, Any],
    info: EngineReady,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    best_of: int | None = None,
    grammar: GrammarSpec | None = None,
) -> SamplingParams:
    """Make the engine's parameters of a request; absent fields take ``defaults``.

    Raises:
        ApiError, InvalidRequestError: a value the model or the engine cannot take.
    """
    vocab_size = info.vocab_size
    n = _or(body.n, 1)
    if body.use_beam_search:
        check_beam_search(n, logprobs, grammar)
    values: dict[str, Any] = {
        "n": n,
        "best_of": best_of,
        "temperature": _temperature(body, defaults),
        "top_p": float(_or(body.top_p, defaults.get("top_p", 1.0))),
        "top_k": _or(body.top_k, defaults.get("top_k", 0)),
        "min_p": float(_or(body.min_p, defaults.get("min_p", 0.0))),
        "seed": body.seed,
        "max_tokens": max_tokens,
        "min_tokens": _or(body.min_tokens, 0),
        "stop": stop_strings(body),
        "stop_token_ids": _check_token_ids(body.stop_token_ids, vocab_size, "stop_token_ids"),
        "include_stop_str_in_output": bool(body.include_stop_str_in_output),
        "ignore_eos": bool(body.ignore_eos),
        "skip_special_tokens": _or(body.skip_special_tokens, True),
        "presence_penalty": float(_or(body.presence_penalty, 0.0)),
        "frequency_penalty": float(_or(body.frequency_penalty, 0.0)),
        "repetition_penalty": float(
            _or(body.repetition_penalty, defaults.get("repetition_penalty", 1.0))
        ),
        "logit_bias": parse_logit_bias(body, vocab_size),
        "allowed_token_ids": _check_token_ids(
            body.allowed_token_ids, vocab_size, "allowed_token_ids"
        ),
        "bad_words_token_ids": parse_bad_words(body.bad_words, tokenizer),
        "logprobs": logprobs,
        "prompt_logprobs": body.prompt_logprobs,
        "grammar": grammar,
    }
    if body.use_beam_search:
        values["beam_width"] = n
        values["length_penalty"] = float(_or(body.length_penalty, 1.0))
    if values["top_p"] == 0.0:
        values["top_p"], values["top_k"] = 1.0, 1
    return with_ranking(SamplingParams(**values))
