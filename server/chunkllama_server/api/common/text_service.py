"""Text to ids and back for the HTTP application: tokenizer, chat template, and threads for long
bodies and texts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from chunkllama.logger import tenant_context
from chunkllama.resources import run_when_idle
from chunkllama.rests import resting
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.fair_pool import FairPool
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import ApiError, exceeded, invalid

T = TypeVar("T")
# What a template does for a message without a text, in characters to tokenize.
_OBJECT_CHARS = 32
# A text that took longer here has delayed every other request as long.
_SLOW_SECONDS = 0.05
_AT_ONCE = 64
_LARGE = 1 << 17  # characters of a text that steps do not wait for
# Work that takes longer leaves its thread's place to a spare one, for other tenants.
_PATIENCE = 0.2  # seconds
_NUM_SPARE = 2
Message = dict[str, Any]


class RequestTemplate:
    """A template that a request brought: compiled, probed and run in a worker thread alone.

    Args:
        source: its text.
        compiled: the template, which is not to be used on the event loop.
        capabilities: what it can express.
        variables: names it reads.
    """

    def __init__(
        self,
        source: str,
        compiled: ChatTemplate,
        capabilities: TemplateCapabilities,
        variables: frozenset[str],
    ) -> None:
        self.source = source
        self.capabilities = capabilities
        self.variables = variables
        self._compiled = compiled

    def write(self, messages: list[Message], **options: Any) -> Callable[[], list[int]]:
        return self._compiled.write(messages, **options)

    def render(self, messages: list[Message], **options: Any) -> str:
        return self._compiled.render(messages, **options)


class TextService:
    """Tokenizes on the event loop when short, in one worker thread with a time limit when long.

    The worker's time is divided among the tenants whose texts wait. While requests run, it rests
    between the pieces of long work.

    Args:
        tokenizer, template: the model's; ``template`` is None for a model without one.
        make_template: builds a template from a source a trusted client sent.
        limits: lengths and times of texts.

    Attributes:
        share: of a tenant in the worker's time, relative to others.
        is_busy: whether requests run.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        make_template: Callable[[str], ChatTemplate] | None = None,
        limits: LimitsConfig = DEFAULT_LIMITS,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._make_template = make_template
        self._limits = limits
        self.share: Callable[[str], float] = lambda _: 1.0
        self.is_busy: Callable[[], bool] = lambda: False
        self._pool = self._make_pool("text")
        # To compute their tokens takes far longer than to find them. Tokenization holds the
        # interpreter's lock only while it makes the list of ids.
        self._large_pool = FairPool(
            1, "large-text", lambda tenant: self.share(tenant), begin_thread=run_when_idle
        )
        # Their own, so that the model's texts do not wait for them.
        self._template_pool = self._make_pool("template")
        self._body_pool = self._make_pool("body")
        self._is_quick = True

    def _make_pool(self, name: str) -> FairPool:
        return FairPool(
            1,
            name,
            lambda tenant: self.share(tenant),
            num_spare=_NUM_SPARE,
            patience=_PATIENCE,
        )

    async def run(self, size: int, work: Callable[[], T], template: object = None) -> T:
        """``work()`` here when the text is short, else in a worker thread.

        Once a short text has taken long (the model's template may do so), all go to the thread;
        ``template`` is the one ``work`` uses, and one from a request always does.

        Raises:
            ApiError: 503 when the time limit passes: the texts of others come first.
        """
        is_foreign = isinstance(template, RequestTemplate)
        if size <= self._limits.text_offload_chars and self._is_quick and not is_foreign:
            started = time.thread_time()
            try:
                return work()
            finally:
                self._is_quick = time.thread_time() - started < _SLOW_SECONDS
        return await self._run_in(self._template_pool if is_foreign else self._pool, work)

    async def prepare(self, num_bytes: int, work: Callable[[], T]) -> T:
        """``work()`` on a request's body: here when that is short, else in a worker thread.

        Args:
            num_bytes: of the body.

        Raises:
            ApiError: 503 when the time limit passes.
        """
        if num_bytes <= self._limits.text_offload_chars:
            return work()
        return await self._run_in(self._body_pool, work)

    async def write(self, num_values: int, work: Callable[[], T]) -> T:
        """``work()`` on an answer, as ``prepare`` on a body, but without a time limit: the answer
        is computed and charged, so it waits as long as it has to."""
        if num_values <= self._limits.text_offload_chars:
            return work()
        return await self._body_pool.run(tenant_context.get(), self._resting(work))

    def _resting(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work`` that rests where it calls ``rest``."""

        def rested() -> T:
            with resting(lambda: self.is_busy()):
                return work()

        return rested

    async def _run_in(self, pool: FairPool, work: Callable[[], T], part: float = 1.0) -> T:
        """``work()`` in a thread, within that part of the time limit."""
        try:
            async with asyncio.timeout(part * self._limits.text_seconds):
                return await pool.run(tenant_context.get(), self._resting(work))
        except TimeoutError:
            raise exceeded(self._limits, "text_seconds") from None

    async def encode(
        self, text: str, *, add_special_tokens: bool, size: int | None = None
    ) -> list[int]:
        """Token ids of a prompt; special-token strings in it are read as special tokens.

        Args:
            size: characters of all texts of the request, if it has several.
        """
        (ids,) = await self._encode_group([text], size or len(text), add_special_tokens)
        return ids

    async def encode_all(
        self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
    ) -> AsyncIterator[list[int]]:
        """Yield the token ids of several prompts, as ``encode``; lists of ids are yielded as they
        are.

        Short texts go to the thread in groups: to hand over each one costs more than its tokens.
        """
        size = texts_size(prompts)
        for group in _groups(prompts, self._limits.text_offload_chars):
            texts = [prompt for prompt in group if isinstance(prompt, str)]
            encoded = iter(await self._encode_group(texts, size, add_special_tokens))
            for item in group:
                yield next(encoded) if isinstance(item, str) else item

    async def _encode_group(
        self, texts: list[str], size: int, add_special_tokens: bool
    ) -> list[list[int]]:
        def work() -> list[list[int]]:
            return [
                self.tokenizer.encode(
                    text, add_special_tokens=add_special_tokens, allow_special=True
                )
                for text in texts
            ]

        if not texts:
            return []
        if self.is_large(len(texts[0])):
            return await self.run_large(work)
        return await self.run(size, work)

    def is_large(self, size: int) -> bool:
        """Return whether steps do not wait for a text of so many characters."""
        return size > max(_LARGE, self._limits.text_offload_chars)

    async def run_large(self, work: Callable[[], T]) -> T:
        """``work()``, which tokenizes, where no thread wants a processor, or from the start in the
        usual thread when it has not had one for half of the time limit.

        Raises:
            ApiError: 503 when the time limit passes.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.text_seconds / 2):
                return await self._large_pool.run(tenant_context.get(), work)
        return await self._run_in(self._pool, work, 0.5)

    async def chat_template(self, override: str | None = None) -> ChatTemplate | RequestTemplate:
        """Return the model's template, or the one a trusted client sent.

        Raises:
            ApiError: the model has none, or the client's cannot be used.
        """
        if override is None:
            if self.template is None:
                raise invalid("This model has no chat template; use /v1/completions", "messages")
            return self.template
        make = self._make_template
        assert make is not None, "templates from requests are not set up"
        if len(override) > self._limits.max_template_chars:
            raise exceeded(self._limits, "max_template_chars", "chat_template", value=len(override))

        def compile_and_probe() -> RequestTemplate:
            compiled = make(override)
            compiled.check()
            return RequestTemplate(override, compiled, compiled.capabilities, compiled.variables)

        try:
            return await self._run_in(self._template_pool, compile_and_probe)
        except ApiError:
            raise
        except Exception as error:  # what an untrusted template raises is not foreseeable
            raise invalid(f"The template cannot be used: {error}", "chat_template") from None

    def close(self) -> None:
        for pool in (self._pool, self._large_pool, self._template_pool, self._body_pool):
            pool.close()


async def pause_after(index: int) -> None:
    """Let the event loop turn to other requests after each 64th of many items."""
    if index % _AT_ONCE == _AT_ONCE - 1:
        await asyncio.sleep(0)


def _groups(
    prompts: Sequence[str | list[int]], num_chars: int
) -> Iterator[Sequence[str | list[int]]]:
    """Divide prompts into runs of at most 64, and of a text alone or at most ``num_chars``."""
    start = chars = 0
    for index, prompt in enumerate(prompts):
        count = len(prompt) if isinstance(prompt, str) else 0
        if index > start and (index == start + _AT_ONCE or chars + count > num_chars):
            yield prompts[start:index]
            start, chars = index, 0
        chars += count
    yield prompts[start:]


def texts_size(prompts: Iterable[str | list[int]]) -> int:
    """Characters of those prompts of a request that are texts."""
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


def text_size(value: Any) -> int:
    """Characters of all strings in plain data, to decide where to tokenize it; each object counts
    as some more.
    """
    size, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += _OBJECT_CHARS
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
    return size
