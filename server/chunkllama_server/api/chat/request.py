"""Prepare a conversation: check the request, choose its tools, tokenize it, run it.

Chat completions, responses and the tokenizer endpoints share this module, so that a prompt which is
shown or counted is the prompt that is generated from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.chat.next_prompt import watch_answer
from chunkllama_server.api.chat.prompt import ChatPrompt, ChatPrompter
from chunkllama_server.api.chat.thinking import with_thoughts
from chunkllama_server.api.common.branches import branch_stream
from chunkllama_server.api.common.context import ServerContext, check_streamable
from chunkllama_server.api.common.forks import fork_stream, without_forks
from chunkllama_server.api.common.joined_stream import Generation
from chunkllama_server.api.common.prompt_cache import CachePlan, cache_plan
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.api.common.sampling import (
    BATCH_PRIORITY,
    check_lengths,
    check_num_logprobs,
    check_prompt_ids,
    request_priority,
    sampling_params,
)
from chunkllama_server.api.common.schema_relaxing import SchemaSource, checked_grammar
from chunkllama_server.api.common.structured_outputs import (
    answer_grammar,
    answer_sources,
    grammar_of,
)
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.tools.call_format import call_format
from chunkllama_server.api.tools.config import ToolConfig, has_typed_answer, plan_tools
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import RequestInfo


async def prepare_chat(
    body: ChatCompletionRequest, context: ServerContext, info: RequestInfo
) -> PreparedChat:
    """Check a request and tokenize its conversation; ``info`` names what was repaired in it.

    Raises:
        ApiError: 400 naming the field.
    """
    _check_fields(body)
    text = context.text
    able = None if text.template is None else text.template.capabilities
    output_format = call_format(context.settings.tool_call_parser, able, text.tokenizer)
    if body.chat_template is not None and not context.settings.trust_request_chat_template:
        raise invalid("chat_template is not accepted by this server", "chat_template")
    template = await context.text.chat_template(body.chat_template)

    def read() -> tuple[ToolConfig, ChatPrompter]:
        tools = plan_tools(body, output_format, context.settings)
        return tools, ChatPrompter(body, context.settings, text, template, tools.prompt_tools)

    tools, prompter = await context.prepare(info, read)
    info.name_repairs(prompter.repairs)
    info.name_ignored_fields(prompter.ignored)
    return PreparedChat(body, context, tools, prompter, await prompter.encode())


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A checked and tokenized conversation.

    Attributes:
        body: the request, in the form of a chat completion.
        tools: which tools the prompt shows and how calls in the output are read.
        prompter: writes the prompt's text.
        prompt: token ids and cache breakpoint.
    """

    body: ChatCompletionRequest
    context: ServerContext
    tools: ToolConfig
    prompter: ChatPrompter
    prompt: ChatPrompt

    async def stream(
        self, info: RequestInfo, request_id: str, param_names: Mapping[str, str]
    ) -> RequestStream:
        """Make the engine's request; it starts when the stream is read.

        Args:
            param_names: the endpoint's names of ``prompt``, ``max_tokens`` and ``beam_width``,
                which the engine may refuse.

        Raises:
            ApiError, InvalidRequestError: 400 naming the field, 429 beyond the tenant's tokens per
                minute.
        """
        context = self.context
        request = without_forks(await self._observed_request(info, request_id), context)
        context.charge(info, [request])
        watch = watch_answer(self.prompter, self.tools, request, context.idle)
        return self._start(info, param_names, request, watch)

    async def generation(
        self, info: RequestInfo, request_id: str, param_names: Mapping[str, str]
    ) -> Generation:
        """Make the engine's request, or those of the branches that the body asks for.

        Args and raises as ``stream``.
        """
        context, start = self.context, partial(self._start, info, param_names)
        if self.body.parallel is None:
            if context.fork_tokens is None:
                return await self.stream(info, request_id, param_names)
            request = await self._observed_request(info, request_id)
            context.charge(info, [request])
            return fork_stream(self.body, request, context, start)
        request = await self._observed_request(info, request_id)
        branches = await branch_stream(self.body, request, context, start, self.max_tokens_field)
        context.charge(info, branches.requests)
        return branches

    async def _observed_request(self, info: RequestInfo, request_id: str) -> EngineRequest:
        request = await self.engine_request(info, request_id)
        observe = partial(
            self.context.metrics.prompt_heads.observe,
            *(request.namespace, self.prompter.messages, request.prompt_token_ids),
        )
        await self.context.prepare(info, observe)
        return request

    def _start(
        self,
        info: RequestInfo,
        param_names: Mapping[str, str],
        request: EngineRequest,
        on_piece: Callable[[OutputDelta], None] | None = None,
    ) -> RequestStream:
        context, thoughts = self.context, self.prompt.thoughts
        return RequestStream(
            context.engine,
            request,
            context.text.tokenizer,
            context.metrics,
            info=info,
            param_names=param_names,
            thoughts=replace(thoughts, shown_ids=thoughts.shown_ids | self.tools.shown_ids),
            on_piece=on_piece,
        )

    @property
    def num_answer_tokens(self) -> int:
        """Tokens within which an answer with a grammar has to end."""
        given: int | None = getattr(self.body, self.max_tokens_field)
        fitting = self.context.engine.info.max_request_tokens - len(self.prompt.token_ids)
        return max(fitting if given is None else min(given, fitting), 1)

    def fit_answer(self, most: int | None) -> bool:
        """Limit the answer to ``most`` tokens, or to what fits if that is less.

        Returns:
            Whether fewer fit. A prompt that leaves none is refused with its length later.
        """
        room = self.context.engine.info.max_request_tokens - len(self.prompt.token_ids)
        fits = most is None or most <= room or room < 1
        self.body.max_completion_tokens = most if fits else room
        return not fits

    @property
    def max_tokens_field(self) -> str:
        """Name the field that limits the answer: the newer one takes precedence."""
        return "max_tokens" if self.body.max_completion_tokens is None else "max_completion_tokens"

    async def engine_request(self, info: RequestInfo, request_id: str) -> EngineRequest:
        """Make the request that the engine runs.

        Raises:
            ApiError, InvalidRequestError: 400 naming the field.
        """
        body, engine = self.body, self.context.engine.info
        ids, max_tokens = self.prompt.token_ids, getattr(self.body, self.max_tokens_field)
        check_prompt_ids(ids, engine, "messages")
        check_lengths(len(ids), max_tokens, engine, "messages", self.max_tokens_field)
        sampling = sampling_params(
            body,
            self.context.generation_defaults,
            engine,
            self.context.text.tokenizer,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await self._grammar(info),
        )
        if not body.stream:
            room = engine.max_request_tokens - len(ids)
            check_num_logprobs([ids], sampling, room, self.context.settings)
        cache = self._cache_plan()
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            sampling=sampling,
            namespace=self.context.tenants.namespace(info.tenant, body.cache_salt),
            tenant=info.tenant,
            cache_until=cache.until,
            pin_seconds=cache.pin_seconds,
            priority=self._priority(info),
            explain=info.wants_explanation or bool(body.explain_cache),
            adapter=info.adapter,
            prediction_token_ids=await self._prediction_ids(),
        )

    async def _prediction_ids(self) -> list[int]:
        """Tokenize the predicted answer, if guesses are made; control tokens are plain text in it,
        as the model writes it.
        """
        if self.body.prediction is None or self.context.settings.speculation == "off":
            return []
        text, tokenizer = self.body.prediction.text, self.context.text.tokenizer
        ids = await self.context.text.run(
            len(text),
            lambda: tokenizer.encode(text, add_special_tokens=False, allow_special=False),
        )
        return ids[: self.context.engine.info.max_request_tokens]

    def _priority(self, info: RequestInfo) -> int:
        if info.is_batch:
            return BATCH_PRIORITY
        highest = self.context.highest_priority(info.tenant)
        return request_priority(self.body.priority, self.body.service_tier, info.tenant, highest)

    def _cache_plan(self) -> CachePlan:
        """What is stored of the prompt; the longest time asked for holds for all of it."""
        marks, position = self.prompt.marks, self.prompt.breakpoint
        if marks and self.context.settings.enable_prefix_caching:
            until, seconds = (max(values) for values in zip(*marks, strict=True))
            return CachePlan(int(until), seconds)
        breakpoints = () if position is None else (position,)
        return cache_plan(self.body, self.context.settings, breakpoints)

    async def _grammar(self, info: RequestInfo) -> GrammarSpec | None:
        """Return the output's grammar, compiled once."""
        body, left_out = self.body, list(self.tools.left_out)
        answer, param = await self.context.prepare(
            info,
            lambda: grammar_of(
                body.response_format, body.structured_outputs, left_out, self.context.settings
            ),
        )
        sources = [*answer_sources(answer, param, body.response_format), *self.tools.sources]

        async def build(schemas: Sequence[Any], patterns: bool) -> tuple[GrammarSpec | None, str]:
            work = partial(self._whole_grammar, answer, param, sources, schemas, patterns)
            return await self.context.prepare(info, work)

        check, num_tokens = self.context.grammars.check, self.num_answer_tokens
        prepare = partial(self.context.prepare, info)
        limits = self.context.settings
        grammar, more = await checked_grammar(check, prepare, build, sources, num_tokens, limits)
        info.name_left_out(left_out + more)
        return with_thoughts(
            grammar,
            self.prompt.thoughts,
            self.body.thinking_token_budget,
            self.context.text.tokenizer,
        )

    def _whole_grammar(
        self,
        answer: GrammarSpec | None,
        param: str,
        sources: Sequence[SchemaSource],
        schemas: Sequence[Any],
        patterns: bool,
    ) -> tuple[GrammarSpec | None, str]:
        """The grammar of calls, of a typed answer or of either, and the field it comes from.

        Args:
            answer: of a typed answer, from the field ``param``.
            schemas: of the answer and of the calls' arguments, in the order of ``sources``.
            patterns: bound the texts that match patterns, too.

        Raises:
            ApiError: 400 for constraints that exclude each other, or too large ones.
        """
        tools, outputs, num_tokens = (
            self.tools,
            self.body.structured_outputs,
            self.num_answer_tokens,
        )
        arguments = [*schemas]
        if answer is not None and answer.kind == "json_schema":
            schema = arguments.pop(0)
            answer = answer_grammar(sources[0], schema, num_tokens, patterns=patterns)
        if outputs is not None and not has_typed_answer(self.body):
            if tools.is_forced:
                raise invalid("A forced tool call excludes structured_outputs", param)
            return answer, param
        # After forced calls the typed answer follows in a later turn.
        tools = tools.with_arguments(arguments).bounded(num_tokens, patterns=patterns)
        grammar = tools.grammar(answer, self.context.settings)
        return grammar, "tools" if tools.is_forced else param


def _check_fields(body: ChatCompletionRequest) -> None:
    """Refuse combinations of fields, and values that the schema admits but nothing implements."""
    check_streamable(body)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.modalities is not None and "audio" in body.modalities:
        raise invalid("Audio output is not supported", "modalities")
    for key, value in (body.metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise invalid(
                "metadata keys have up to 64 characters, values up to 512", f"metadata.{key[:64]}"
            )
