"""Parallel branches of one answer, as in APAR (arXiv 2401.06761), for any caller.

Each branch is a request whose prompt is the parent's prompt and the branch's lead. So the prefix
tree computes and stores the parent's full chunks once, a fork shares these nodes and copies or
computes part of one chunk, and all branches decode as one batch. At the join the parent continues
after the text of its branches, as one more request: the tokens of the first branch are in the
cache, those of the others are computed at their new positions.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from chunkllama.errors import ENDED_ON_DEMAND, RequestFailedError
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.output_processor import OutputDelta
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.common.joined_stream import JoinedStream
from chunkllama_server.api.common.merged import merged
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import check_lengths
from chunkllama_server.api.common.text_service import texts_size
from chunkllama_server.api.schema.base import GenerationFields, ParallelBranches
from chunkllama_server.api.schema.usage import TokenCounts
from chunkllama_server.transport.errors import exceeded, invalid

SEPARATOR = "\n\n"
# Fields whose meaning for several branches and a join is not defined, if they ask for something.
_EXCLUDED = ("use_beam_search", "tools", "functions", "structured_outputs", "echo")
_EXCLUDED_NUMBERS = ("logprobs", "prompt_logprobs", "thinking_token_budget")
Start = Callable[[EngineRequest], RequestStream]


@dataclass(slots=True)
class _Branch:
    lead: str
    lead_ids: list[int]
    stream: RequestStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    stopped_at_text: bool = False
    finish_reason: str | None = None
    error: RequestFailedError | None = None

    def add(self, piece: OutputDelta) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.stopped_at_text |= isinstance(piece.stop_reason, str)
        self.finish_reason = piece.finish_reason or self.finish_reason

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the lead and the text."""
        if self.stopped_at_text:  # its tokens reach beyond the text
            tail = tokenizer.encode(self.text, add_special_tokens=False, allow_special=False)
            return [*self.lead_ids, *tail]
        ended = bool(self.token_ids) and self.token_ids[-1] in tokenizer.eos_token_ids
        return [*self.lead_ids, *(self.token_ids[:-1] if ended else self.token_ids)]


def excluded_field(body: GenerationFields) -> str | None:
    """Name a field of the request that branches exclude; None if it has none."""
    fields = {name: getattr(body, name, None) for name in type(body).model_fields}
    for name in _EXCLUDED:
        if fields.get(name):
            return name
    for name in _EXCLUDED_NUMBERS:
        if fields.get(name) is not None and fields[name] is not False:
            return name
    for name in ("n", "best_of"):
        if (fields.get(name) or 1) > 1:
            return name
    answer_format = fields.get("response_format")
    is_typed = answer_format is not None and answer_format.type != "text"
    return "response_format" if is_typed else None


def with_most_tokens(sampling: SamplingParams, most: int) -> SamplingParams:
    """Lower the limits of an answer to what is left for it."""
    least = min(sampling.min_tokens, most)
    return msgspec.structs.replace(sampling, max_tokens=most, min_tokens=least)


class BranchStream(JoinedStream):
    """The branches of a request and what follows their join, as one stream of one choice.

    Args:
        request: the parent; its ``max_tokens`` limits each branch.
        leads: text and token ids that each branch begins with.
        spec: the request's ``parallel``.
        start: makes the stream of an engine request.
        tokenizer: of the model.
        max_request_tokens: prompt and answer together.
    """

    def __init__(
        self,
        request: EngineRequest,
        leads: Sequence[tuple[str, list[int]]],
        spec: ParallelBranches,
        start: Start,
        tokenizer: Tokenizer,
        max_request_tokens: int,
    ) -> None:
        self._spec = spec
        self._start = start
        self._tokenizer = tokenizer
        self._max_request_tokens = max_request_tokens
        self._branches = [
            _Branch(lead, ids, start(_branch_request(request, ids, number)))
            for number, (lead, ids) in enumerate(leads)
        ]
        super().__init__(request, self._branches[0].stream)
        self._after: RequestStream | None = None

    @property
    def requests(self) -> list[EngineRequest]:
        """The branches' requests."""
        return [branch.stream.request for branch in self._branches]

    @property
    def counts(self) -> TokenCounts:
        """Tokens so far: the shared prompt once, each lead, the output of branches and join."""
        parts = [branch.stream.counts for branch in self._branches]
        answers = [*parts, *([] if self._after is None else [self._after.counts])]
        return TokenCounts(
            prompt=len(self.request.prompt_token_ids)
            + sum(len(b.lead_ids) for b in self._branches),
            cached=min(part.cached for part in parts),
            written=sum(part.written for part in parts),
            output=sum(answer.output for answer in answers),
            accepted=sum(each.accepted for each in answers),
            rejected=sum(each.rejected for each in answers),
            reasoning=sum(answer.reasoning for answer in answers),
        )

    def _shown(self, number: int, pieces: list[OutputDelta], begun: set[int]) -> list[OutputDelta]:
        """Take what a branch has yielded; returns it with its number, behind its lead at first."""
        branch, shown = self._branches[number], []
        if number not in begun:
            begun.add(number)
            shown.append(OutputDelta(0, text=branch.lead, branch=number))
        for piece in pieces:
            branch.add(piece)
            shown.append(
                OutputDelta(
                    0,
                    text=piece.text,
                    reasoning=piece.reasoning,
                    token_ids=piece.token_ids,
                    branch=number,
                )
            )
        return shown

    async def pieces(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield each branch's text with the branch's index, then the parent's after the join.

        Raises:
            InvalidRequestError, OverloadedError, DeadlineError, EngineDeadError: from the engine.
        """
        begun: set[int] = set()
        streams = [self._until_ended(branch) for branch in self._branches]
        async with aclosing(merged(streams)) as outputs:
            async for batch in outputs:
                yield [shown for part in batch for shown in self._shown(*part, begun)]
        errors = [branch.error for branch in self._branches]
        if errors[0] is not None and all(errors):
            raise errors[0]
        self._after = self._join()
        if self._after is None:
            reasons = {branch.finish_reason for branch in self._branches}
            reason = "length" if "length" in reasons or self._spec.join_tokens != 0 else "stop"
            yield [OutputDelta(0, finish_reason=reason, whole_text=self._joined(""))]
            return
        answer = ""
        async with aclosing(self._after.pieces()) as stream:
            async for pieces in stream:
                for piece in pieces:
                    answer += piece.text
                    if piece.finish_reason is not None:
                        piece.whole_text = self._joined(answer)
                yield pieces

    async def _until_ended(self, branch: _Branch) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield a branch's output; it ends early where the operator ended its request."""
        try:
            async with aclosing(branch.stream.pieces()) as stream:
                async for pieces in stream:
                    yield pieces
        except RequestFailedError as error:
            if error.code != ENDED_ON_DEMAND:
                raise
            branch.error = error

    def _joined(self, answer: str) -> str:
        """The text of the choice; ``answer`` is what follows the branches."""
        texts = [branch.lead + branch.text for branch in self._branches]
        if self._spec.join == "last":
            return answer
        if self._spec.join == "json":
            parts = {"branches": texts} | ({} if self._after is None else {"answer": answer})
            return json.dumps(parts, ensure_ascii=False)
        return SEPARATOR.join([*texts, *([] if self._after is None else [answer])])

    def _join(self) -> RequestStream | None:
        """The parent's request after the branches' text; None where it is to say nothing more, or
        where the texts, whose limits leave room for it, took more tokens than the model wrote."""
        if self._spec.join_tokens == 0:
            return None
        tokenizer, sampling = self._tokenizer, self.request.sampling
        separator = tokenizer.encode(SEPARATOR, add_special_tokens=False, allow_special=False)
        ids = list(self.request.prompt_token_ids)
        for branch in self._branches:
            ids += [*branch.ids(tokenizer), *separator]
        room = self._max_request_tokens - len(ids)
        if room < 1:
            return None
        most = min(self._spec.join_tokens or sampling.max_tokens or room, room)
        return self._start(
            msgspec.structs.replace(
                self.request,
                prompt_token_ids=ids,
                sampling=with_most_tokens(sampling, most),
                pin_seconds=0.0,
                explain=False,
            )
        )


def _branch_request(parent: EngineRequest, lead_ids: list[int], number: int) -> EngineRequest:
    """One branch; the first one keeps the prefix and explains its match, once for all."""
    request = msgspec.structs.replace(
        parent,
        request_id=f"{parent.request_id}-{number}",
        prompt_token_ids=[*parent.prompt_token_ids, *lead_ids],
    )
    if number == 0:
        return request
    return msgspec.structs.replace(request, pin_seconds=0.0, explain=False)


async def branch_stream(
    body: GenerationFields,
    request: EngineRequest,
    context: ServerContext,
    start: Start,
    max_tokens_field: str,
) -> BranchStream:
    """Check ``parallel`` and make the stream of a request's branches.

    Args:
        request: the parent, whose ``max_tokens`` is None where the client names none; branches and
            join then share what fits.
        start: makes the stream of an engine request.
        max_tokens_field: the endpoint's name of the limit.

    Raises:
        ApiError: 400 naming the field: another field is set that excludes branches, there are too
            many, or they do not fit the context.
    """
    spec, settings, info = body.parallel, context.settings, context.engine.info
    assert spec is not None
    if (name := excluded_field(body)) is not None:
        raise invalid(f"parallel excludes {name}; leave one of them out", name)
    if spec.join == "last" and spec.join_tokens == 0:
        raise invalid('join "last" needs join_tokens of at least 1', "parallel.join_tokens")
    if len(spec.branches) > settings.max_request_choices:
        raise exceeded(
            settings, "max_request_choices", "parallel.branches", value=len(spec.branches)
        )
    size = texts_size(spec.branches)
    leads = [
        (lead, await context.text.encode(lead, add_special_tokens=False, size=size))
        for lead in spec.branches
    ]
    limited = _limited(request, spec, [len(ids) for _, ids in leads], context, max_tokens_field)
    return BranchStream(
        limited, leads, spec, start, context.text.tokenizer, info.max_request_tokens
    )


def _limited(
    request: EngineRequest,
    spec: ParallelBranches,
    lead_lengths: list[int],
    context: ServerContext,
    max_tokens_field: str,
) -> EngineRequest:
    """The parent with the limit of a branch, so that all branches and the join fit together."""
    info, num_branches = context.engine.info, len(lead_lengths)
    separator = len(
        context.text.tokenizer.encode(SEPARATOR, add_special_tokens=False, allow_special=False)
    )
    fixed = len(request.prompt_token_ids) + sum(lead_lengths) + separator * num_branches
    join_tokens = spec.join_tokens
    given = request.sampling.max_tokens
    if given is None:
        check_lengths(fixed + num_branches, join_tokens, info, "parallel.branches", "parallel")
        room = info.max_request_tokens - fixed - (join_tokens or 0)
        given = max(room // (num_branches + (join_tokens is None)), 1)
        sampling = with_most_tokens(request.sampling, given)
        return msgspec.structs.replace(request, sampling=sampling)
    after = given if join_tokens is None else join_tokens
    check_lengths(fixed, given * num_branches + after, info, "parallel.branches", max_tokens_field)
    return request
