"""What values of translated fields become: own fields, with their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from chunkllama_server.api.dialect.shaped import DialectError
from chunkllama_server.api.dialect.tool_shapes import chat_tool_choice, response_tool_choice
from chunkllama_server.api.dialect.values import (
    chat_format_of,
    completion_limit,
    effort_word,
    response_reasoning,
    text_format_of,
    thinks,
    token_limit,
)
from chunkllama_server.api.schema.spellings import as_flag, as_number

Endpoint = Literal["chat", "completions", "responses", "embeddings", "tokenize"]
Becomes = Callable[[Any, Endpoint], Mapping[str, Any]]


# Names of `repetition_penalty` on other servers.
REPETITION_NAMES = "repeat_penalty repetitionPenalty rep_pen"
THINKING_BUDGETS = ("thinkingBudget", "thinking_budget")
THINKING_LEVELS = ("thinkingLevel", "thinking_level")


def to(target: str) -> Becomes:
    """The same value under another name."""
    return lambda value, _: {target: value}


def read_flag(value: Any) -> bool:
    """A flag, also as a text.

    Raises:
        DialectError: for anything else.
    """
    value = as_flag(value)
    if not isinstance(value, bool):
        raise DialectError("must be true or false")
    return value


def flag(target: str, meaning: Any = True) -> Becomes:
    """A boolean that sets one field when it is true."""
    return lambda value, _: {target: meaning} if read_flag(value) else {}


def limit(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """The answer's limit; -1 and -2 are none."""
    if endpoint == "completions":
        return {"max_tokens": completion_limit(value).value}
    return token_limit(value, "max_output_tokens" if endpoint == "responses" else "max_tokens")


def not_sampled(value: Any, _: Endpoint) -> dict[str, Any]:
    """Whether tokens are drawn; false is greedy."""
    return {} if read_flag(value) else {"temperature": 0}


def seed(value: Any, _: Endpoint) -> dict[str, Any]:
    """A seed; -1 is none."""
    return {} if as_number(value) == -1 else {"seed": value}


def top_logprobs(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """Log-probabilities of so many tokens."""
    if endpoint == "completions":
        return {"logprobs": value}
    return {"logprobs": True, "top_logprobs": value}


def thinking(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """Whether to think: true, an effort, or an object of type enabled or disabled."""
    if isinstance(value, dict):
        kind = value.get("type")
        if kind not in ("enabled", "disabled", "adaptive", "auto"):
            raise DialectError("must have the type enabled or disabled")
        if kind == "enabled" and value.get("budget_tokens") is not None:
            return {**thinking(True, endpoint), "thinking_token_budget": value["budget_tokens"]}
        if kind in ("adaptive", "auto"):
            return {}
        value = kind == "enabled"
    if isinstance(value, str):
        value = {"enabled": True, "disabled": False}.get(value, as_flag(value))
    if isinstance(value, str):
        return effort(value, endpoint)
    return thinks(read_flag(value))


def effort(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """How much to think."""
    word = effort_word(value).value
    return {"reasoning.effort" if endpoint == "responses" else "reasoning_effort": word}


def reasoning(value: Any, _: Endpoint) -> dict[str, Any]:
    """OpenRouter's reasoning; the Responses API has a field of the same name."""
    if not isinstance(value, dict):
        raise DialectError("must be an object")
    shaped = response_reasoning(value)
    meanings = {target: meaning for target, (_, meaning) in shaped.also.items()}
    if value.get("effort") is not None:
        meanings |= effort(value["effort"], "chat")
    return meanings


def thinking_config(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """Gemini's budget or level of the thoughts; -1 is the model's own."""
    if not isinstance(value, dict):
        raise DialectError("must be an object")
    meanings: dict[str, Any] = {}
    for name in THINKING_BUDGETS:
        if value.get(name) not in (None, ""):
            meanings |= token_limit(value[name], "thinking_token_budget")
    for name in THINKING_LEVELS:
        level = value.get(name)
        if level is not None and not isinstance(level, str):
            raise DialectError(f"must have a {name} that is a text")
        if level:
            meanings |= effort(level.lower(), endpoint)
    return meanings


def continued(value: Any, _: Endpoint) -> dict[str, Any]:
    """Whether the last message is continued."""
    wants = {"continue_final_message": True, "add_generation_prompt": False}
    return wants if read_flag(value) else {}


def output_config(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """Anthropic's effort and format of the answer."""
    if not isinstance(value, dict):
        raise DialectError("must be an object with format or effort")
    meanings: dict[str, Any] = {}
    if value.get("effort") is not None:
        meanings |= effort(value["effort"], endpoint)
    if value.get("format") is not None:
        is_chat = endpoint == "chat"
        given = {"format": value["format"]}
        meanings |= chat_format_of(given) if is_chat else text_format_of(value["format"])
    return meanings


def banned_ids(value: Any, _: Endpoint) -> dict[str, Any]:
    """Token ids that are never generated."""
    ids = [as_number(token_id) for token_id in (value if isinstance(value, list) else [value])]
    if not all(type(token_id) is int for token_id in ids):
        raise DialectError("must be a list of token ids")
    return {f"logit_bias.{token_id}": -100 for token_id in ids}


def tool_choice(value: Any, endpoint: Endpoint) -> dict[str, Any]:
    """A tool choice in the shape of AI SDK or of another API."""
    if isinstance(value, dict) and isinstance(value.get("toolName"), str):
        value = {"type": "tool", "name": value["toolName"]}
    read = response_tool_choice if endpoint == "responses" else chat_tool_choice
    return {"tool_choice": read(value).value}


def mime_type(value: Any, _: Endpoint) -> dict[str, Any]:
    """Gemini's type of the answer."""
    if value == "text/plain":
        return {}
    if value == "application/json":
        return {"structured_outputs.json_object": True}
    raise DialectError("must be text/plain or application/json")


def has_penalty(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for a penalty whose window the field bounds."""
    names = ("repetition_penalty", *REPETITION_NAMES.split())
    repeats = [as_number(body.get(name)) for name in names]
    others = [as_number(body.get(name)) for name in ("presence_penalty", "frequency_penalty")]
    return any(value not in (None, 1, "") for value in repeats) or any(others)


def scales_before(body: Mapping[str, Any]) -> bool:
    """Whether the place of the temperature among the samplers shows: at 0 and 1 it does not."""
    return as_number(body.get("temperature")) not in (0, 1)
