"""Text to ids and back for the HTTP application: tokenizer, chat template, and a thread for long
texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.transport.errors import invalid, unavailable

T = TypeVar("T")
Message = dict[str, Any]


class TextService:
    """Tokenizes on the event loop when short, in one worker thread with a time limit when long.

    Args:
        tokenizer, template: the model's; ``template`` is None for a model without one.
        make_template: builds a template from a source a trusted client sent.
        offload_bytes: texts longer than this leave the event loop.
        time_limit: seconds one request's text may take.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        make_template: Callable[[str], ChatTemplate] | None = None,
        offload_bytes: int = 8192,
        time_limit: float = 10.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._make_template = make_template
        self._offload_bytes = offload_bytes
        self._time_limit = time_limit
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """``work()`` here when the text is short, else in the worker thread.

        Raises:
            ApiError: 503 when the time limit passes: the texts of others come first.
        """
        if size <= self._offload_bytes:
            return work()
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            async with asyncio.timeout(self._time_limit):
                return await future
        except TimeoutError:
            raise unavailable("Too many long texts are being tokenized", "tokenizer_busy") from None

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; special-token strings in it are read as special tokens."""
        return await self.run(
            len(text),
            lambda: self.tokenizer.encode(
                text, add_special_tokens=add_special_tokens, allow_special=True
            ),
        )

    def chat_template(self, override: str | None = None) -> ChatTemplate:
        """The model's template, or the one a trusted client sent.

        Raises:
            ApiError: the model has none.
        """
        if override is not None:
            assert self._make_template is not None, "templates from requests are not set up"
            try:
                return self._make_template(override)
            except Exception as error:  # what a stranger's template raises is not foreseeable
                raise invalid(f"The template cannot be used: {error}", "chat_template") from None
        if self.template is None:
            raise invalid("This model has no chat template; use /v1/completions", "messages")
        return self.template

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def text_size(value: Any) -> int:
    """Characters of all strings in plain data, to decide where to tokenize it."""
    size, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
    return size
