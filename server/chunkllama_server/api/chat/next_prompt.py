"""Prepare the next turn's prompt where the template drops the thoughts of this one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from chunkllama.messages import EngineRequest
from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.chat.prompt import ChatPrompter
from chunkllama_server.api.common.idle_prefill import IdlePrefill, PrefillJob
from chunkllama_server.api.tools.config import ToolConfig


class AnswerWatch:
    """Collects an answer; where it has thoughts, its prefix in the next prompt is offered.

    Args:
        idle: computes the prefix.
    """

    def __init__(
        self, prompter: ChatPrompter, tools: ToolConfig, request: EngineRequest, idle: IdlePrefill
    ) -> None:
        self._prompter = prompter
        self._tools = tools
        self._request = request
        self._idle = idle
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._token_ids: list[int] = []

    def add(self, piece: OutputDelta) -> None:
        """Take the next piece of the answer."""
        self._text.append(piece.text)
        self._thoughts.append(piece.reasoning)
        self._token_ids += piece.token_ids
        if piece.finish_reason in ("stop", "length"):
            self._end()

    def _end(self) -> None:
        text, thoughts = "".join(self._text), "".join(self._thoughts)
        if not thoughts or not text:
            return
        parser = self._tools.parser()
        parsed = parser.feed(text)
        parsed.extend(parser.finish())
        if parsed.calls:  # their results belong to this turn, in which templates keep thoughts
            return
        answer = {"role": "assistant", "content": text, "reasoning_content": thoughts}
        request = self._request
        known = [*request.prompt_token_ids, *self._token_ids]
        encode = partial(self._prompter.encode_past, answer)
        # An activated adapter begins at the last invocation: what precedes it is the base model's.
        adapter = "" if self._idle.is_activated(request.adapter) else request.adapter
        self._idle.offer(PrefillJob(request.namespace, request.tenant, encode, known, adapter))


def watch_answer(
    prompter: ChatPrompter, tools: ToolConfig, request: EngineRequest, idle: IdlePrefill | None
) -> Callable[[OutputDelta], None] | None:
    """What collects the answer to a request; None where the next prompt continues it as it is."""
    is_plain = request.sampling.num_sequences == 1 and request.cache_until is None
    if idle is None or not is_plain or not prompter.drops_thoughts:
        return None
    return AnswerWatch(prompter, tools, request, idle).add
