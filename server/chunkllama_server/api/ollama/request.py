"""Requests of Ollama's API as the chat completions they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkllama_server.api.schema.chat import (
    CalledFunction,
    ChatCompletionRequest,
    ChatMessage,
    JsonSchemaFormat,
    MessageToolCall,
    ResponseFormat,
)
from chunkllama_server.api.schema.completions import CompletionRequest
from chunkllama_server.api.schema.ollama import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaGeneration,
    OllamaMessage,
    OllamaOptions,
)
from chunkllama_server.transport.errors import invalid

# Fields of the completion by the client's name, for errors.
SPELLED = {
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "response_format.json_schema.schema": "format",
    "response_format": "format",
    "reasoning_effort": "think",
    "repetition_penalty": "options.repeat_penalty",
    "stop": "options.stop",
    "seed": "options.seed",
    "temperature": "options.temperature",
    "top_k": "options.top_k",
    "top_p": "options.top_p",
}

_RANDOM_SEED = -1
# Ollama's own, for what neither the request nor the model sets. Its repeat_penalty of 1.1 is not
# among them: there it looks at the last 64 tokens, here a penalty looks at prompt and answer, where
# it would keep the names and the markup of tools from being repeated.
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


class _Reader:
    """Turns messages into those of a chat; calls and results are joined by order or name."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.repairs: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self._num_calls = 0

    def read(self, message: OllamaMessage, path: str, *, is_current: bool) -> None:
        content = message.content or ""
        if message.images:
            if is_current and message.role != "tool":
                raise invalid("Images are not supported; send text", f"{path}.images")
            self.repairs.append(f"{path}.images")
            content = "\n".join(part for part in (content, "[image]") if part)
        fields: dict[str, Any] = {}
        if message.role == "assistant":
            if message.tool_calls:
                fields["tool_calls"] = self._calls(message)
            if message.thinking:
                fields["reasoning_content"] = message.thinking
        elif message.role == "tool":
            fields["tool_call_id"] = self._result_of(message)
        made = ChatMessage.model_construct(
            {"role", "content", *fields}, role=message.role, content=content, **fields
        )
        self.messages.append(made.from_path(path))

    def _calls(self, message: OllamaMessage) -> list[MessageToolCall]:
        self._open = []
        calls = []
        for call in message.tool_calls or ():
            call_id = call.id or f"call_{self._num_calls}"
            self._num_calls += 1
            self._open.append((call_id, call.function.name))
            function = CalledFunction(name=call.function.name, arguments=call.function.arguments)
            calls.append(MessageToolCall(id=call_id, function=function))
        return calls

    def _result_of(self, message: OllamaMessage) -> str:
        if message.tool_call_id is not None:
            return message.tool_call_id
        named = [entry for entry in self._open if entry[1] == message.tool_name]
        found = (named or self._open or [("call_0", None)])[0]
        if found in self._open:
            self._open.remove(found)
        return found[0]


def chat_of(body: OllamaChatRequest, model: Mapping[str, Any]) -> ChatCompletionRequest:
    """The chat completion of POST /api/chat.

    A last message of the assistant is continued; an empty one is the same as none.

    Args:
        model: the model's own sampling values.

    Raises:
        ApiError: 400 for images in the turn to be answered, or no message.
    """
    given, continues = list(body.messages or ()), False
    if given and given[-1].role == "assistant" and not given[-1].tool_calls:
        continues = bool(given[-1].content)
        given = given if continues else given[:-1]
    if not given:
        raise invalid("The conversation has no message", "messages")
    answers = [index for index, message in enumerate(given[:-1]) if message.role == "assistant"]
    turn_start = answers[-1] + 1 if answers else 0
    reader = _Reader()
    for index, message in enumerate(given):
        reader.read(message, f"messages[{index}]", is_current=index >= turn_start)
    chat = ChatCompletionRequest.model_construct(
        messages=reader.messages,
        tools=body.tools,
        continue_final_message=continues or None,
        add_generation_prompt=False if continues else None,
        **_shared(body, model),
    )
    chat.repairs.extend(reader.repairs)
    return chat


def chat_of_prompt(body: OllamaGenerateRequest, model: Mapping[str, Any]) -> ChatCompletionRequest:
    """The chat completion of POST /api/generate: the prompt is a message of the user.

    Args:
        model: the model's own sampling values.
    """
    messages = [ChatMessage(role="user", content=body.prompt or "").from_path("prompt")]
    if body.system:
        messages.insert(0, ChatMessage(role="system", content=body.system).from_path("system"))
    return ChatCompletionRequest.model_construct(messages=messages, **_shared(body, model))


def completion_of(
    body: OllamaGenerateRequest, model: Mapping[str, Any], most: int
) -> CompletionRequest:
    """The text completion of a raw prompt.

    Args:
        model: the model's own sampling values.
        most: tokens of the answer where the request has no limit.
    """
    shared = _sampling(body.options or OllamaOptions(), model)
    limit = shared.pop("max_completion_tokens")
    return CompletionRequest.model_construct(
        model=body.model,
        prompt=body.prompt or "",
        max_tokens=limit or most,
        response_format=_response_format(body),
        **shared,
    )


def _shared(body: OllamaGeneration, model: Mapping[str, Any]) -> dict[str, Any]:
    think = body.think
    effort = {True: "medium", False: "none", None: None}.get(think, think)  # type: ignore[arg-type]
    return {
        "model": body.model,
        "response_format": _response_format(body),
        "reasoning_effort": effort,
        **_sampling(body.options or OllamaOptions(), model),
    }


def _sampling(options: OllamaOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    limit = options.num_predict
    values = {
        name: getattr(options, name)
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "seed", "stop"),
            *("presence_penalty", "frequency_penalty"),
        )
    }
    if values["seed"] == _RANDOM_SEED:
        values["seed"] = None
    for name, default in _DEFAULTS.items():
        if values[name] is None and name not in model:
            values[name] = default
    return {
        "max_completion_tokens": limit if limit is not None and limit > 0 else None,
        "repetition_penalty": options.repeat_penalty,
        **values,
    }


def _response_format(body: OllamaGeneration) -> ResponseFormat | None:
    if not body.format:
        return None
    if isinstance(body.format, str):
        return ResponseFormat(type="json_object")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=body.format))
