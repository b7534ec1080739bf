"""Check a conversation, adapt it to the chat template, and tokenize it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chunkllama.errors import InvalidRequestError
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.template_adapter import adapt
from chunkllama.text.thoughts import NO_THOUGHTS, Thoughts
from chunkllama_server.api.chat.cache_marks import Tools, changed_behind
from chunkllama_server.api.chat.history import normalise
from chunkllama_server.api.chat.thinking import (
    find_thoughts,
    refused_thoughts,
    thinking_arguments,
    thought_tags,
)
from chunkllama_server.api.common.prompt_cache import common_prefix
from chunkllama_server.api.common.text_service import (
    Message,
    RequestTemplate,
    TextService,
    text_size,
)
from chunkllama_server.api.schema.chat import CacheMark, ChatCompletionRequest, ChatMessage
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.errors import invalid

# What differs between two next turns: the prompts share what stands before it.
_NEXT_TEXTS = ("a", "b")
# The end of a prompt that shows whether it has opened the thoughts: a tag and white space.
_TAIL_TOKENS = 32
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# In the operator's list: every name that the template reads.
_ANY_VARIABLE = "*"
# Set by the server; a request must not write another conversation or other control tokens.
_OWN_VARIABLES = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"),
        *("mask_token", "additional_special_tokens", "raise_exception", "strftime_now"),
    )
)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Token ids of a rendered conversation.

    Attributes:
        breakpoint: tokens before the last explicit cache breakpoint; None without one.
        marks: tokens before each of the request's cache marks, and the seconds that they are kept.
        continued_text: content of the final message, when the answer continues it.
        thoughts: how the thoughts of the answer are separated from it.
    """

    token_ids: list[int]
    breakpoint: int | None = None
    marks: tuple[tuple[int, float], ...] = ()
    continued_text: str = ""
    thoughts: Thoughts = NO_THOUGHTS


def last_breakpoint(messages: list[ChatMessage]) -> CacheMark | None:
    """Where the last explicit breakpoint of content parts is."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].content
        if isinstance(content, list):
            for j in range(len(content) - 1, -1, -1):
                if content[j].prompt_cache_breakpoint is not None:
                    return CacheMark(seconds=0.0, message=i, part=j)
    return None


def template_kwargs(
    body: ChatCompletionRequest,
    settings: Settings,
    variables: frozenset[str],
    honoured: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], list[str]]:
    """Template variables that a request sets, and the paths of those that have no effect.

    Args:
        variables: names that the template reads.
        honoured: names that have an effect without it.

    Raises:
        ApiError: 400 for a name that the server sets itself or the operator does not allow, or a
            value that is not plain.
    """
    allowed = settings.chat_template_kwargs
    kwargs: dict[str, Any] = {}
    ignored = []
    for name, value in (body.chat_template_kwargs or {}).items():
        path = f"chat_template_kwargs.{name[:64]}"
        is_allowed = name in allowed or (name in variables and _ANY_VARIABLE in allowed)
        if value is None:
            continue
        if not _VARIABLE.fullmatch(name) or name in _OWN_VARIABLES:
            raise invalid(f"{path} is not a variable that requests may set", "chat_template_kwargs")
        if not isinstance(value, str | bool | int | float):
            raise invalid(f"{path} must be text, a number or a boolean", "chat_template_kwargs")
        if is_allowed:
            kwargs[name] = value
        elif name in variables:
            raise invalid(
                f"{path} is not allowed here; allowed: {', '.join(allowed)}",
                "chat_template_kwargs",
            )
        elif name in honoured:
            continue
        elif settings.strict:
            raise invalid(f"The template reads no {path}", path, "unknown_field")
        else:
            ignored.append(path)
    return kwargs, ignored


class ChatPrompter:
    """Renders and tokenizes the conversation of one request.

    Raises (on construction and in its methods):
        ApiError: 400 naming the field.
    """

    def __init__(
        self,
        body: ChatCompletionRequest,
        settings: Settings,
        text: TextService,
        template: ChatTemplate | RequestTemplate,
        tools: list[dict[str, Any]] | None,
    ) -> None:
        if body.add_special_tokens:
            raise invalid("The chat template writes special tokens itself", "add_special_tokens")
        continues = bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            raise invalid(
                "continue_final_message excludes add_generation_prompt", "continue_final_message"
            )
        self._template = template
        self._body = body
        self._text = text
        self._tools = tools
        history = normalise(body.messages)
        self._continued_text: str = history.messages[-1]["content"] if continues else ""
        self.repairs = [*body.repairs, *history.repairs]
        self._messages = history.messages
        self._options: dict[str, Any] = {
            "add_generation_prompt": not continues and body.add_generation_prompt is not False,
            "continue_final_message": continues,
            "require_all_text": True,
        }
        self._settings = settings
        self._template_kwargs, self.ignored = template_kwargs(
            body, settings, template.variables, self._honoured()
        )
        self._size = text_size([self._messages, tools, self._options, self._template_kwargs])

    def _honoured(self) -> frozenset[str]:
        """Template arguments that turn thoughts off where the template has no switch for them."""
        if isinstance(self._template, RequestTemplate):
            return frozenset()  # it is probed in the worker thread
        tags = thought_tags(self._settings, self._template.capabilities)
        return frozenset() if tags is None else refused_thoughts(self._body)

    async def encode(self) -> ChatPrompt:
        """Token ids, and where the last cache breakpoint lies in them."""
        if not self._text.is_large(self._size):
            return await self._text.run(self._size, lambda: self._write()(), self._template)
        finish = await self._text.run(self._size, self._write, self._template)
        return await self._text.run_large(finish)

    async def render(self) -> str:
        """The prompt's text."""
        return await self._text.run(self._size, self._render, self._template)

    def _render(self) -> str:
        text = self._template.render(**self._arguments(self._messages, self._tools))
        return text + self._find_thoughts(text)[1]

    def _find_thoughts(self, prompt: str) -> tuple[Thoughts, str]:
        tags = thought_tags(self._settings, self._template.capabilities)
        return find_thoughts(self._body, tags, prompt, self._text.tokenizer)

    def _write(self) -> Callable[[], ChatPrompt]:
        """Render the prompt and what stands before each mark; what is returned tokenizes them."""
        limit, marks = self._body.truncate_prompt_tokens, self._body.cache_marks
        position = last_breakpoint(self._body.messages) if limit is None else None
        try:
            whole = self._template.write(**self._arguments(self._messages, self._tools))
            before = None if position is None else self._write_before(position)
            parts = [self._write_before(mark) for mark in marks]
        except InvalidRequestError as error:
            raise invalid(error.message, error.param or "messages", error.code) from None

        def tokenize() -> ChatPrompt:
            tokenizer, ids = self._text.tokenizer, whole()
            tail = tokenizer.decode(ids[-_TAIL_TOKENS:], skip_special_tokens=False)
            thoughts, closing = self._find_thoughts(tail)
            ids = [*ids, *tokenizer.encode(closing, allow_special=True)] if closing else ids
            ids = ids if limit is None else ids[-limit:]
            reusable = None if before is None else common_prefix(ids, before())
            found = zip(parts, marks, strict=True)
            kept = tuple((common_prefix(ids, part()), mark.seconds) for part, mark in found)
            return ChatPrompt(ids, reusable, kept, self._continued_text, thoughts)

        return tokenize

    def _arguments(self, messages: list[Message], tools: Tools) -> dict[str, Any]:
        """Arguments of the template's methods: messages and tools in the forms it has.

        A template from a request is compiled and probed here, so only in the worker thread.
        """
        able = self._template.capabilities
        messages, tools = adapt(messages, tools, able)
        arguments = thinking_arguments(self._body, able, self._template_kwargs)
        return {
            "messages": messages,
            "tools": tools,
            "template_kwargs": arguments,
            **self._options,
        }

    @property
    def messages(self) -> list[Message]:
        """The conversation as templates read it."""
        return self._messages

    @property
    def drops_thoughts(self) -> bool:
        """Whether the model thinks and the next prompt lacks the thoughts of the answer."""
        able, body = self._template.capabilities, self._body
        continues = body.continue_final_message or body.add_generation_prompt is False
        is_whole = not continues and body.truncate_prompt_tokens is None
        is_own = not isinstance(self._template, RequestTemplate)
        thinks = thought_tags(self._settings, able) is not None
        return is_own and is_whole and thinks and not able.keeps_thoughts

    async def encode_past(self, answer: Message) -> list[int]:
        """Token ids that the prompts begin with in which the user goes on after ``answer``."""
        size = self._size + text_size(answer)
        return await self._text.run(size, lambda: self._encode_past(answer), self._template)

    def _encode_past(self, answer: Message) -> list[int]:
        prompts = []
        for text in _NEXT_TEXTS:
            messages = [*self._messages, answer, {"role": "user", "content": text}]
            arguments = self._arguments(messages, self._tools)
            prompts.append(self._template.write(**{**arguments, "add_generation_prompt": False})())
        first, second = prompts
        return first[: common_prefix(first, second)]

    def _write_before(self, mark: CacheMark) -> Callable[[], list[int]]:
        """Render the conversation with something else behind the mark: the prompt's tokens up to
        the mark are those that both begin with.
        """
        messages, tools = changed_behind(mark, self._body.messages, self._tools)
        arguments = self._arguments(messages, tools)
        if messages[-1]["role"] != "assistant":  # what would be continued was replaced
            arguments["continue_final_message"] = False
        return self._template.write(**arguments)
