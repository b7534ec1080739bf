"""One stream of one choice that several engine requests make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from chunkllama.messages import EngineRequest
from chunkllama.text.output_processor import OutputDelta, OutputProcessor
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.schema.usage import CacheExplanationBody, Precision, TokenCounts


class Generation(Protocol):
    """What an answer is made from: one request's stream, or that of its branches."""

    request: EngineRequest

    @property
    def output(self) -> OutputProcessor: ...

    @property
    def counts(self) -> TokenCounts: ...

    @property
    def num_logprobs(self) -> int: ...

    @property
    def precision(self) -> Precision | None: ...

    def explanations(self) -> list[CacheExplanationBody]: ...

    def pieces(self) -> AsyncGenerator[list[OutputDelta], None]: ...

    async def collect(self) -> list[OutputDelta]: ...


class JoinedStream(ABC):
    """A choice whose text comes from several requests; what is known of the prompt, from the first.

    Args:
        request: the answer's.
        first: the stream that computes the prompt.

    Attributes:
        request: the answer's.
    """

    def __init__(self, request: EngineRequest, first: RequestStream) -> None:
        self.request = request
        self._first = first

    @property
    def output(self) -> OutputProcessor:
        """Output state of the first request."""
        return self._first.output

    @property
    @abstractmethod
    def counts(self) -> TokenCounts:
        """Tokens so far; the shared prompt counts once."""

    @property
    def precision(self) -> Precision | None:
        """The type of cached K/V; "" if it is the one that the model computes in."""
        return self._first.precision

    @property
    def num_logprobs(self) -> int:
        """None: several requests exclude log-probabilities."""
        return 0

    def explanations(self) -> list[CacheExplanationBody]:
        """Return the explanation of the prompt's match, if one was asked for and is known."""
        return self._first.explanations()

    @abstractmethod
    def pieces(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield text as it comes, with its branch; the last delta has the whole text."""

    async def collect(self) -> list[OutputDelta]:
        """Run to the end and return the one choice."""
        whole = OutputDelta(0)
        async with aclosing(self.pieces()) as stream:
            async for pieces in stream:
                for piece in pieces:
                    whole.extend(piece)
                    whole.text = whole.text if piece.whole_text is None else piece.whole_text
        return [whole]
