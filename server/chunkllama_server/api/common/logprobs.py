"""Format token log-probabilities for the chat and the completions endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from chunkllama.messages import TokenLogprob
from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.schema.chat_response import ChatLogprobs, ChatTokenLogprob, PromptLogprob
from chunkllama_server.api.schema.completions import CompletionLogprobs

# JSON has no -Infinity; OpenAI reports -9999 for an impossible token.
_LOWEST = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


class TextOffsets:
    """Computes the offset, in characters, of each token of a growing text.

    Args:
        before: tokens that precede the text and are not part of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            cast(Any, tokenizer), skip_special_tokens, before
        )
        self._end = 0

    def add(self, token_id: int) -> int:
        """Return the next token's offset; parts of a character share the character's offset."""
        begin = self._end
        self._end += len(self._detokenizer.add([token_id]))
        return begin


class LogprobFormatter:
    """Writes tokens as text, or as ``token_id:N`` on request."""

    def __init__(self, tokenizer: Tokenizer, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def token(self, token_id: int) -> str:
        if self._as_token_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))

    def chat(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
        """Format the log-probabilities of a chat choice or chunk."""
        content: list[ChatTokenLogprob] = [
            {
                "token": self.token(entry.token_id),
                "logprob": _finite(entry.logprob),
                "bytes": self._bytes(entry.token_id),
                "top_logprobs": [
                    {
                        "token": self.token(token_id),
                        "logprob": _finite(logprob),
                        "bytes": self._bytes(token_id),
                    }
                    for token_id, logprob in entry.top
                ],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def offsets(self, before: Sequence[int], skip_special_tokens: bool) -> TextOffsets:
        """Make the offsets of one choice, for ``completion``."""
        return TextOffsets(self._tokenizer, before, skip_special_tokens)

    def completion(
        self,
        entries: Sequence[TokenLogprob | None],
        token_ids: Sequence[int],
        offsets: TextOffsets,
    ) -> CompletionLogprobs:
        """Return parallel lists; the entry of the prompt's first token, not predicted, is None."""
        result: CompletionLogprobs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for entry, token_id in zip(entries, token_ids, strict=True):
            result["tokens"].append(self.token(token_id))
            result["text_offset"].append(offsets.add(token_id))
            if entry is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
                continue
            result["token_logprobs"].append(_finite(entry.logprob))
            top = {self.token(entry.token_id): _finite(entry.logprob)}
            for other, logprob in entry.top:  # parts of characters may share a text
                top.setdefault(self.token(other), _finite(logprob))
            result["top_logprobs"].append(top)
        return result

    def prompt(
        self, entries: Sequence[TokenLogprob | None]
    ) -> list[dict[str, PromptLogprob] | None]:
        """Return each prompt token's entry and the best ones, by token id; null for the first."""
        return [None if entry is None else self._prompt_entry(entry) for entry in entries]

    def _prompt_entry(self, entry: TokenLogprob) -> dict[str, PromptLogprob]:
        shown: dict[str, PromptLogprob] = {
            str(entry.token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": self.token(entry.token_id),
            }
        }
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            shown.setdefault(
                str(token_id),
                {
                    "logprob": _finite(logprob),
                    "rank": rank,
                    "decoded_token": self.token(token_id),
                },
            )
        return shown
