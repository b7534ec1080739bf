"""Branches that an APAR-tuned model begins by itself (arXiv 2401.06761).

Such a model writes a fork token where a part of its answer is left to a branch, and goes on with
the next part. The branch is a request of its own: it continues the parent's tokens up to the fork
with the child token, and finds their full chunks in the prefix tree. Branches may fork too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from chunkllama.errors import (
    ENDED_ON_DEMAND,
    DeadlineError,
    OverloadedError,
    RequestFailedError,
)
from chunkllama.messages import EngineRequest
from chunkllama.text.output_processor import OutputDelta
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.branches import (
    Start,
    excluded_field,
    with_most_tokens,
)
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.joined_stream import Generation, JoinedStream
from chunkllama_server.api.common.merged import Merger
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.schema.base import GenerationFields
from chunkllama_server.api.schema.usage import TokenCounts


@dataclass(slots=True)
class _Thread:
    """One sequence of the answer; ``branches`` stand behind so many of its tokens."""

    stream: RequestStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    branches: list[tuple[int, _Thread]] = field(default_factory=list)
    finish_reason: str | None = None

    def whole_text(self, tokenizer: Tokenizer) -> str:
        """The text with that of each branch in its place."""
        parts, done = [], 0
        for num_tokens, branch in self.branches:
            before = tokenizer.decode(
                self.token_ids[:num_tokens], self.stream.request.sampling.skip_special_tokens
            )
            parts += [self.text[done : len(before)], branch.whole_text(tokenizer)]
            done = max(done, len(before))
        return "".join([*parts, self.text[done:]])


async def _until_ended(branch: RequestStream) -> AsyncGenerator[list[OutputDelta], None]:
    """Yield a branch's output; the answer goes on without the rest of a branch that was refused,
    that waited too long or that the operator ended."""
    try:
        async with aclosing(branch.pieces()) as stream:
            async for pieces in stream:
                yield pieces
    except (OverloadedError, DeadlineError):
        return
    except RequestFailedError as error:
        if error.code != ENDED_ON_DEMAND:
            raise


class ForkStream(JoinedStream):
    """An answer and the branches that it forks, as one stream of one choice.

    Args:
        request: the answer's.
        tokens: ids of the fork and the child.
        start: makes the stream of an engine request.
        max_threads: the answer and its branches; a fork beyond them is left without a branch.
        max_request_tokens: prompt and answer together.
        tokenizer: of the model.
    """

    def __init__(
        self,
        request: EngineRequest,
        tokens: tuple[int, int],
        start: Start,
        max_threads: int,
        max_request_tokens: int,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(request, start(request))
        self._fork, self._child = tokens
        self._start = start
        self._max_threads = max_threads
        self._max_request_tokens = max_request_tokens
        self._tokenizer = tokenizer
        self._threads = [_Thread(self._first)]

    @property
    def counts(self) -> TokenCounts:
        """Tokens so far: the prompt once, the output of the answer and its branches."""
        parts = [thread.stream.counts for thread in self._threads]
        first, *_ = parts
        return TokenCounts(
            prompt=first.prompt,
            cached=first.cached,
            written=first.written,
            output=sum(part.output for part in parts),
            accepted=sum(each.accepted for each in parts),
            rejected=sum(each.rejected for each in parts),
            reasoning=sum(part.reasoning for part in parts),
        )

    async def pieces(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield the text of the answer, and that of branches with the branch's index from 1 on.

        Raises:
            InvalidRequestError, OverloadedError, DeadlineError, EngineDeadError: from the engine.
        """
        merger = Merger()
        merger.add(self._threads[0].stream.pieces())
        async with aclosing(merger.outputs()) as outputs:
            async for batch in outputs:
                shown = []
                for number, piece in ((n, piece) for n, pieces in batch for piece in pieces):
                    thread = self._threads[number]
                    thread.text += piece.text
                    thread.finish_reason = piece.finish_reason or thread.finish_reason
                    for branch in self._add(thread, piece.token_ids):
                        merger.add(_until_ended(branch.stream))
                    shown.append(
                        OutputDelta(
                            0,
                            text=piece.text,
                            reasoning=piece.reasoning,
                            token_ids=piece.token_ids,
                            branch=number or None,
                        )
                    )
                yield shown
        root = self._threads[0]
        text = root.whole_text(self._tokenizer)
        yield [OutputDelta(0, finish_reason=root.finish_reason, whole_text=text)]

    def _add(self, thread: _Thread, token_ids: list[int]) -> list[_Thread]:
        """Take tokens of a thread; returns the branches that they fork."""
        begun: list[_Thread] = []
        for token_id in token_ids:
            thread.token_ids.append(token_id)
            if token_id != self._fork or len(self._threads) >= self._max_threads:
                continue
            branch = self._branch(thread, len(self._threads))
            if branch is not None:
                thread.branches.append((len(thread.token_ids), branch))
                self._threads.append(branch)
                begun.append(branch)
        return begun

    def _branch(self, thread: _Thread, number: int) -> _Thread | None:
        ids = [*thread.stream.request.prompt_token_ids, *thread.token_ids, self._child]
        room = self._max_request_tokens - len(ids)
        if room < 1:
            return None
        sampling = self.request.sampling
        most = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        request = msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}-{number}",
            prompt_token_ids=ids,
            sampling=with_most_tokens(sampling, most),
            pin_seconds=0.0,
            explain=False,
        )
        return _Thread(self._start(request))


def fork_stream(
    body: GenerationFields, request: EngineRequest, context: ServerContext, start: Start
) -> Generation:
    """Make the stream of an answer, which forks if the model does and the request admits it."""
    if context.fork_tokens is None or excluded_field(body) is not None:
        return start(without_forks(request, context))
    return ForkStream(
        request,
        context.fork_tokens,
        start,
        context.settings.max_request_choices,
        context.engine.info.max_request_tokens,
        context.text.tokenizer,
    )


def without_forks(request: EngineRequest, context: ServerContext) -> EngineRequest:
    """Forbid the fork token where no branch would be begun: its part of the answer would be
    missing."""
    if context.fork_tokens is None:
        return request
    words = (*request.sampling.bad_words_token_ids, context.fork_tokens[:1])
    sampling = msgspec.structs.replace(request.sampling, bad_words_token_ids=words)
    return msgspec.structs.replace(request, sampling=sampling)
