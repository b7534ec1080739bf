"""How a request's answer thinks: tags around thoughts, template arguments, the budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from chunkllama.sampling_params import GrammarSpec, ThinkingSpec
from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.thoughts import NO_THOUGHTS, Thoughts, ThoughtTags, tag_ids
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.config.settings import Settings

# Arguments of templates that turn thoughts on and off.
_SWITCHES = ("enable_thinking", "thinking")


def thought_tags(settings: Settings, able: TemplateCapabilities) -> ThoughtTags | None:
    """The operator's tags, else those that the template or the vocabulary has."""
    configured = settings.reasoning_tags
    if configured == ("none",):
        return None
    if configured == ("auto",):
        return None if able.thought_tags is None else ThoughtTags(*able.thought_tags)
    return ThoughtTags(*configured)


def thinking_arguments(
    body: ChatCompletionRequest, able: TemplateCapabilities, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Template arguments for the effort that was asked for; what the client set itself stays."""
    arguments: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        arguments["reasoning_effort"] = body.reasoning_effort
    wants = _wants_thoughts(body)
    if able.thinking_switch is not None and wants is not None:
        arguments[able.thinking_switch] = wants
    return {**arguments, **given}


def _wants_thoughts(body: ChatCompletionRequest) -> bool | None:
    if body.thinking_token_budget == 0:
        return False
    if body.reasoning_effort is not None:
        return body.reasoning_effort != "none"
    return False if refused_thoughts(body) else None


def refused_thoughts(body: ChatCompletionRequest) -> frozenset[str]:
    """The template arguments by which a request turns thoughts off."""
    given = body.chat_template_kwargs or {}
    return frozenset(name for name in _SWITCHES if given.get(name) is False)


def find_thoughts(
    body: ChatCompletionRequest, tags: ThoughtTags | None, prompt: str, tokenizer: Tokenizer
) -> tuple[Thoughts, str]:
    """The thoughts that follow a prompt, and text to append so that unwanted ones are closed.

    Args:
        prompt: its text, or the end of it.
    """
    if tags is None:
        return NO_THOUGHTS, ""
    prompt = prompt.rstrip()
    is_open = prompt.endswith(tags.start)
    special = tag_ids(tags, tokenizer)
    is_generated = body.add_generation_prompt is not False and not body.continue_final_message
    if is_generated and _wants_thoughts(body) is False and not prompt.endswith(tags.end):
        begun = "" if is_open else f"{tags.start}\n"
        return Thoughts(tags, shown_ids=special), f"{begun}\n{tags.end}\n\n"
    return Thoughts(tags, is_open, special), ""


def with_thoughts(
    grammar: GrammarSpec | None, thoughts: Thoughts, budget: int | None, tokenizer: Tokenizer
) -> GrammarSpec | None:
    """A grammar that holds from the end of the thoughts on, and the budget of the thoughts."""
    tags = thoughts.tags
    start = None if tags is None else tokenizer.token_id(tags.start)
    can_think = tags is not None and (thoughts.is_open or start is not None)
    if tags is None or not can_think or (grammar is None and budget is None):
        return grammar
    thinking = ThinkingSpec(
        is_open=thoughts.is_open,
        start_token_id=start,
        end=tags.end,
        end_token_ids=tuple(tokenizer.encode(tags.end, allow_special=True)),
        budget=budget,
    )
    if grammar is None:
        return GrammarSpec(kind="any", text="", thinking=thinking)
    return msgspec.structs.replace(grammar, thinking=thinking)
