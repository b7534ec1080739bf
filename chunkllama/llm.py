"""The offline API: generate from prompts in this process, no server."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.config import EngineConfig, LogConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.client import as_exception, seed_source, with_seed
from chunkllama.errors import ConfigError, InvalidRequestError, OverloadedError
from chunkllama.messages import EngineRequest, TokenDelta, TokenLogprob
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.output_processor import OutputCollector, OutputProcessor, with_ranking
from chunkllama.text.template_adapter import adapt, plain_messages, template_tool
from chunkllama.text.thoughts import NO_THOUGHTS, Thoughts, ThoughtTags, tag_ids
from chunkllama.text.tokenizer import load_tokenizer

Prompt = str | Sequence[int]
Conversation = list[dict[str, Any]]
# The end of a prompt that shows whether it has opened the thoughts: a tag and white space.
_TAIL_TOKENS = 32


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request: ``text`` is decoded, ``finish_reason`` None while it runs.

    ``reasoning`` has the thoughts that a chat model wrote before its answer; they are no part of
    ``text``.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str = ""


@dataclass(slots=True)
class RequestOutput:
    """All choices of one request; ``num_cached_tokens`` prompt tokens were not computed again."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finished: bool = False


class LLM:
    """A model and its engine, used synchronously.

    Args:
        model: an alias, a Hugging Face folder, a ``.gguf`` file, or a hub id.
        settings: any key of EngineConfig but those of the log, e.g. ``num_chunks=512`` or
            ``dtype="float32"``.

    Raises:
        ConfigError: the model or a setting is unusable; one line says why.

    Example:
        >>> llm = LLM("smollm2-135m-instruct")
        >>> llm.generate("2 + 2 =", SamplingParams(max_tokens=2))[0].outputs[0].text
    """

    def __init__(self, model: str = "smollm2-135m-instruct", **settings: Any) -> None:
        if given := LogConfig.model_fields.keys() & settings.keys():
            raise ConfigError(
                f"{min(given)}: the importing program configures logging; "
                'use logging.getLogger("chunkllama")'
            )
        config = EngineConfig.from_flat(model=model, **settings)
        folder = resolve_model(model)
        self._tokenizer = load_tokenizer(folder)
        self._template = load_chat_template(folder, self._tokenizer)
        use_defaults = config.model.generation_config == "auto"
        defaults = read_spec(folder).default_sampling if use_defaults else {}
        self._defaults = msgspec.convert(defaults, SamplingParams, strict=False)
        self._core = build_engine(config)
        self._ids = itertools.count()
        self._draw_seed = seed_source(config.model.seed)

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter from a folder that PEFT has saved, for ``adapter`` of later calls.

        Raises:
            ConfigError: the folder cannot be used, or the name is in use; one line says why.
        """
        reply = self._core.load_adapter(LoadAdapter(command_id=0, name=name, folder=folder))
        while reply is None:
            self._core.step()
            reply = next(iter(self._core.adapter_replies()), None)
        if reply.error:
            raise ConfigError(reply.error)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str = "",
        use_progress_bar: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or token ids); outputs are in the order of the prompts.

        Args:
            sampling_params: used for all prompts. Default: the model's own, with answers up to the
                end of the context.
            adapter: name of a loaded adapter; "" is the model alone.

        Raises:
            InvalidRequestError: a prompt does not fit the context or the pool, or no such adapter
                is loaded.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several = cast(Sequence[Prompt], [prompts] if single else prompts)
        encoded = [self._encode(prompt) for prompt in several]
        sampling = sampling_params or self._defaults
        return self._run(encoded, sampling, adapter, use_progress_bar, continues_prompt=True)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens=True, allow_special=True)
            return prompt, ids
        return None, list(prompt)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str = "",
        use_progress_bar: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once, through the model's chat template.

        What the template has no form for is said in the nearest form it has, as the server does.
        Thoughts are separated from the answer by the tags of the template.

        Args:
            messages: as in a chat completion: text or text parts, tool calls, tool results.
            adapter: name of a loaded adapter; "" is the model alone.
            template_options: ``tools``, ``template_kwargs``, ``add_generation_prompt``,
                ``continue_final_message``.

        Raises:
            InvalidRequestError: the template refuses a conversation or leaves out a text of it.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use generate()", "messages")
        single = len(messages) > 0 and isinstance(messages[0], dict)
        several = cast(Sequence[Conversation], [messages] if single else messages)
        encoded: list[tuple[str | None, list[int]]] = [
            (None, self._encode_chat(conversation, **template_options)) for conversation in several
        ]
        sampling = sampling_params or self._defaults
        return self._run(encoded, sampling, adapter, use_progress_bar, continues_prompt=False)

    def _encode_chat(
        self, messages: Conversation, *, tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        assert self._template is not None
        able = self._template.capabilities
        described = [template_tool(tool["function"]) for tool in tools or ()]
        chat, shown = adapt(plain_messages(messages), described or None, able)
        return self._template.encode(chat, tools=shown, require_all_text=True, **options)

    def _thoughts(self, ids: list[int]) -> Thoughts:
        """How the thoughts of a chat's answer are separated from it."""
        able = None if self._template is None else self._template.capabilities
        if able is None or able.thought_tags is None:
            return NO_THOUGHTS
        tags = ThoughtTags(*able.thought_tags)
        tail = self._tokenizer.decode(ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        is_open = tail.rstrip().endswith(tags.start)
        return Thoughts(tags, is_open, tag_ids(tags, self._tokenizer))

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling: SamplingParams,
        adapter: str,
        use_progress_bar: bool,
        continues_prompt: bool,
    ) -> list[RequestOutput]:
        sent = with_ranking(sampling)
        generations = []
        for text, ids in prompts:
            request = self._make_request(ids, sent, adapter)
            processor = OutputProcessor(
                request,
                self._tokenizer,
                continues_prompt=continues_prompt,
                thoughts=NO_THOUGHTS if continues_prompt else self._thoughts(ids),
            )
            generations.append(_Generation(request, sampling, text, processor))
        live = {generation.request.request_id: generation for generation in generations}
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
        )
        try:
            console = Console(stderr=True)  # stdout belongs to the script
            with Progress(*columns, console=console, disable=not use_progress_bar) as progress:
                bar = progress.add_task("", total=len(generations), tokens=0)
                waiting = deque(generation.request for generation in generations)
                while waiting or self._core.has_work():
                    self._add_while_accepted(waiting)
                    for delta in self._core.step():
                        for index in live[delta.request_id].add(delta):
                            self._core.abort(delta.request_id, index)
                    progress.update(
                        bar,
                        completed=sum(g.processor.is_finished for g in generations),
                        tokens=sum(g.processor.num_tokens for g in generations),
                    )
        finally:
            for request_id in live:  # after an error; unknown ids are ignored
                self._core.abort(request_id)
        return [generation.result() for generation in generations]

    def _make_request(
        self, ids: list[int], sampling: SamplingParams, adapter: str
    ) -> EngineRequest:
        request = EngineRequest(
            request_id=f"llm-{next(self._ids)}",
            prompt_token_ids=ids,
            sampling=sampling,
            adapter=adapter,
        )
        return with_seed(request, self._draw_seed)

    def _add_while_accepted(self, waiting: deque[EngineRequest]) -> None:
        """Queue requests until the engine accepts no more; the rest are added later."""
        while waiting:
            try:
                self._core.add(waiting[0])
            except OverloadedError:
                return
            waiting.popleft()

    def close(self) -> None:
        """Release the model and the pool; the LLM cannot be used afterwards."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Generation:
    """One prompt's request and its output so far."""

    def __init__(
        self,
        request: EngineRequest,
        sampling: SamplingParams,
        prompt: str | None,
        processor: OutputProcessor,
    ) -> None:
        self.request = request
        self.processor = processor
        self._collector = OutputCollector(request.sampling)
        self._sampling = sampling
        self._prompt = prompt

    def add(self, delta: TokenDelta) -> list[int]:
        """Add a delta; returns the choices that the engine has to abort."""
        if delta.error is not None:
            raise as_exception(delta.error)
        completed = self.processor.add(delta)
        self._collector.add(completed)
        return [new.index for new in completed if new.needs_abort]

    def result(self) -> RequestOutput:
        """Return the finished output."""
        return RequestOutput(
            self.request.request_id,
            self._prompt,
            self.request.prompt_token_ids,
            outputs=[
                CompletionOutput(
                    choice.index,
                    choice.text,
                    choice.token_ids,
                    choice.finish_reason,
                    choice.stop_reason,
                    None if self._sampling.logprobs is None else choice.logprobs,
                    choice.reasoning,
                )
                for choice in self._collector.result()
            ],
            num_cached_tokens=self.processor.num_cached_tokens,
            prompt_logprobs=self.processor.prompt_logprobs,
            finished=self.processor.is_finished,
        )
