"""Items of a response's output, and the message that they amount to."""

from __future__ import annotations

import uuid
from typing import Any, Literal, cast

from chunkllama_server.api.schema.chat import CalledFunction, ChatMessage, MessageToolCall
from chunkllama_server.api.schema.chat_response import ChatTokenLogprob
from chunkllama_server.api.schema.response_object import OutputItem, OutputReasoning, OutputText


def item_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def output_text(text: str, logprobs: list[ChatTokenLogprob]) -> OutputText:
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": cast(list[Any], logprobs),
    }


def reasoning_item(text: str, status: Literal["in_progress", "completed"]) -> OutputReasoning:
    return {
        "id": item_id("rs"),
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "status": status,
    }


def assistant_message(output: list[OutputItem]) -> ChatMessage:
    """Return the output as the message that a following response continues."""
    text, thoughts, calls = "", "", []
    for item in output:
        if item["type"] == "message":
            text += "".join(part["text"] for part in item["content"])
        elif item["type"] == "reasoning":
            thoughts += "".join(part["text"] for part in item["content"])
        else:
            function = CalledFunction(name=item["name"], arguments=item["arguments"])
            calls.append(MessageToolCall(id=item["call_id"], function=function))
    # Not validated: a model may make more calls than a request may carry.
    return ChatMessage.model_construct(
        role="assistant",
        content=text,
        tool_calls=calls or None,
        reasoning_content=thoughts or None,
    )
