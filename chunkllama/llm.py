"""The offline API: generate from prompts in this process, no server."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkllama.config import EngineConfig, LogConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.client import as_exception, seed_source, with_seed
from chunkllama.errors import ConfigError, InvalidRequestError, OverloadedError
from chunkllama.messages import (
    ChoiceDelta,
    CompletionOutput,
    EngineRequest,
    RequestOutput,
    TokenDelta,
)
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.detokenizer import IncrementalDetokenizer, StopChecker
from chunkllama.text.tokenizer import load_tokenizer

Prompt = str | Sequence[int]
Conversation = list[dict[str, Any]]


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
                f"{min(given)}: the program that imports chunkllama says what is logged; "
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

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        use_progress_bar: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or token ids); outputs stand in the prompts' order.

        Args:
            sampling_params: of all prompts; without them the model's own defaults, and answers up
                to the end of the context.

        Raises:
            InvalidRequestError: a prompt does not fit the context or the pool.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several = cast(Sequence[Prompt], [prompts] if single else prompts)
        encoded = [self._encode(prompt) for prompt in several]
        sampling = sampling_params or self._defaults
        return self._run(encoded, sampling, use_progress_bar, continues_prompt=True)

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
        use_progress_bar: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once, through the model's chat template."""
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use generate()", "messages")
        single = len(messages) > 0 and isinstance(messages[0], dict)
        several = cast(Sequence[Conversation], [messages] if single else messages)
        encoded: list[tuple[str | None, list[int]]] = [
            (None, self._template.encode(conversation, **template_options))
            for conversation in several
        ]
        sampling = sampling_params or self._defaults
        return self._run(encoded, sampling, use_progress_bar, continues_prompt=False)

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling: SamplingParams,
        use_progress_bar: bool,
        continues_prompt: bool,
    ) -> list[RequestOutput]:
        ranked = sampling.num_sequences > sampling.n and sampling.logprobs is None
        sent = msgspec.structs.replace(sampling, logprobs=0) if ranked else sampling
        assemblies = [
            _Assembly(
                self._make_request(ids, sent),
                sampling,
                text,
                self._tokenizer,
                ids if continues_prompt else (),
            )
            for text, ids in prompts
        ]
        live = {assembly.request.request_id: assembly for assembly in assemblies}
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
        )
        try:
            console = Console(stderr=True)  # stdout is the script's own
            with Progress(*columns, console=console, disable=not use_progress_bar) as progress:
                bar = progress.add_task("", total=len(assemblies), tokens=0)
                waiting = deque(assembly.request for assembly in assemblies)
                while waiting or self._core.has_work():
                    self._add_while_accepted(waiting)
                    for delta in self._core.step():
                        for index in live[delta.request_id].take(delta):
                            self._core.abort(delta.request_id, index)
                    progress.update(
                        bar,
                        completed=sum(a.output.finished for a in assemblies),
                        tokens=sum(a.num_tokens for a in assemblies),
                    )
        finally:
            for request_id in live:  # those that an error left behind; unknown ids are ignored
                self._core.abort(request_id)
        return [assembly.result() for assembly in assemblies]

    def _make_request(self, ids: list[int], sampling: SamplingParams) -> EngineRequest:
        request_id = f"llm-{next(self._ids)}"
        request = EngineRequest(request_id=request_id, prompt_token_ids=ids, sampling=sampling)
        return with_seed(request, self._draw_seed)

    def _add_while_accepted(self, waiting: deque[EngineRequest]) -> None:
        """Queue requests until the engine has as many as it takes; the rest follow later."""
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


class _Assembly:
    """Puts one request's deltas together into text, ending a choice where a stop string matches."""

    def __init__(
        self,
        request: EngineRequest,
        sampling: SamplingParams,
        prompt: str | None,
        tokenizer: Any,
        continued_ids: Sequence[int],
    ) -> None:
        self.request = request
        self.num_tokens = 0
        self._sampling = sampling
        self.output = RequestOutput(request.request_id, prompt, request.prompt_token_ids)
        count = sampling.n if sampling.beam_width > 1 else sampling.num_sequences
        self.output.outputs = [CompletionOutput(i, "", []) for i in range(count)]
        self._detokenizers = [
            IncrementalDetokenizer(tokenizer, sampling.skip_special_tokens, continued_ids)
            for _ in range(count)
        ]
        self._stops = [
            StopChecker(sampling.stop, sampling.include_stop_str_in_output) for _ in range(count)
        ]

    def take(self, delta: TokenDelta) -> list[int]:
        """Add a delta; returns the choices that a stop string has just ended."""
        if delta.error is not None:
            raise as_exception(delta.error)
        if delta.prompt_logprobs is not None:
            self.output.prompt_logprobs = delta.prompt_logprobs
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, delta.num_cached_tokens)
        stopped = [
            choice.index
            for choice in delta.choices
            if self.output.outputs[choice.index].finish_reason is None and self._add(choice)
        ]
        self.output.finished = all(c.finish_reason is not None for c in self.output.outputs)
        return stopped

    def _add(self, choice: ChoiceDelta) -> bool:
        completion = self.output.outputs[choice.index]
        self.num_tokens += len(choice.token_ids)
        completion.token_ids.extend(choice.token_ids)
        if choice.logprobs is not None:
            completion.logprobs = [*(completion.logprobs or []), *choice.logprobs]
        detokenizer, stop = self._detokenizers[choice.index], self._stops[choice.index]
        shown = choice.token_ids
        if choice.stop_token_id is not None and shown and shown[-1] == choice.stop_token_id:
            shown = shown[:-1]
        text = detokenizer.add(shown)
        if choice.finish_reason is not None:
            text += detokenizer.finish()
        if len(completion.token_ids) < self._sampling.min_tokens:
            emitted, matched = text, None
        else:
            emitted, matched = stop.feed(text)
        completion.text += emitted
        if matched is not None:
            completion.finish_reason, completion.stop_reason = "stop", matched
            return choice.finish_reason is None
        if choice.finish_reason is not None:
            completion.text += stop.flush()
            completion.finish_reason = choice.finish_reason
            if choice.stop_token_id in self._sampling.stop_token_ids:
                completion.stop_reason = choice.stop_token_id
        return False

    def result(self) -> RequestOutput:
        """The finished output: of ``best_of`` choices the n with the best mean log-probability."""
        choices, n = self.output.outputs, self._sampling.n
        if len(choices) > n:

            def mean(choice: CompletionOutput) -> float:
                values = [entry.logprob for entry in choice.logprobs or []]
                return sum(values) / max(len(values), 1)

            choices = sorted(choices, key=mean, reverse=True)[:n]
            for index, choice in enumerate(choices):
                choice.index = index
                if self._sampling.logprobs is None:
                    choice.logprobs = None
            self.output.outputs = choices
        return self.output
