"""A generation in the format of Text Generation Inference, whole or as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from chunkllama.messages import TokenLogprob
from chunkllama.text.output_processor import OutputDelta
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.schema.tgi import (
    TgiAnswer,
    TgiDetails,
    TgiEvent,
    TgiFinish,
    TgiParameters,
    TgiPrefillToken,
    TgiToken,
)
from chunkllama_server.transport.error_shapes import tgi_body
from chunkllama_server.transport.sse import COMMENT, StreamForm, sse

TGI_STREAM = StreamForm(
    media_type="text/event-stream",
    error=lambda error: sse(tgi_body(error)),
    waiting=COMMENT,
    silent=COMMENT,
)


@dataclass(slots=True)
class TgiGeneration:
    """One answer.

    Attributes:
        before: text of the prompt, where the answer begins with it.
    """

    parameters: TgiParameters
    generation: RequestStream
    tokenizer: Tokenizer
    before: str = ""

    async def whole(self) -> TgiAnswer:
        """Run the generation and return the answer."""
        piece = (await self.generation.collect())[0]
        answer: TgiAnswer = {"generated_text": self.before + piece.text}
        if self.parameters.details:
            details: TgiDetails = {
                "finish_reason": self._finish_reason(piece),
                "generated_tokens": self.generation.output.num_tokens,
                "seed": self.parameters.seed,
                "prefill": self._prefill(),
                "tokens": [
                    self._token(entry, self.tokenizer.token_str(entry.token_id))
                    for entry in piece.logprobs
                ],
            }
            answer["details"] = details
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield one event a token; their texts add up to the answer, the last has all of it."""
        text, index = self.before, 0
        async with aclosing(self.generation.pieces()) as stream:
            async for pieces in stream:
                for piece in pieces:
                    text += piece.text
                    for event in self._events(piece, index, text):
                        index += 1
                        yield sse(event)

    def _events(self, piece: OutputDelta, index: int, text: str) -> list[TgiEvent]:
        # A stop string that is complete may end an answer without a token of its own.
        entries = piece.logprobs or ([_NO_TOKEN] if piece.finish_reason is not None else [])
        events: list[TgiEvent] = []
        for number, entry in enumerate(entries):
            is_last = number == len(entries) - 1
            event: TgiEvent = {
                "index": index + number + 1,
                "token": self._token(entry, piece.text if is_last else ""),
                "generated_text": None,
                "details": None,
            }
            if is_last and piece.finish_reason is not None:
                event["generated_text"] = text
                event["details"] = {
                    "finish_reason": self._finish_reason(piece),
                    "generated_tokens": self.generation.output.num_tokens,
                    "seed": self.parameters.seed,
                    "input_length": len(self.generation.request.prompt_token_ids),
                }
            events.append(event)
        return events

    def _token(self, entry: TokenLogprob, text: str) -> TgiToken:
        return {
            "id": entry.token_id,
            "text": text,
            "logprob": max(entry.logprob, _LOWEST),
            "special": entry.token_id in self.tokenizer.special_ids,
        }

    def _prefill(self) -> list[TgiPrefillToken]:
        ids = self.generation.request.prompt_token_ids
        found = self.generation.output.prompt_logprobs or []
        return [
            {
                "id": token_id,
                "text": self.tokenizer.token_str(token_id),
                "logprob": None if entry is None else max(entry.logprob, _LOWEST),
            }
            for token_id, entry in zip(ids, found, strict=False)
        ]

    @staticmethod
    def _finish_reason(piece: OutputDelta) -> TgiFinish:
        if piece.finish_reason == "length":
            return "length"
        return "stop_sequence" if isinstance(piece.stop_reason, str) else "eos_token"


_LOWEST = -9999.0  # JSON has no -Infinity
_NO_TOKEN = TokenLogprob(0, 0.0, 1, [])
