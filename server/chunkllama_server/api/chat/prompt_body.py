"""Tokenize a body that holds a prompt or a conversation."""

from __future__ import annotations

from chunkllama_server.api.chat.request import prepare_chat
from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.schema.tokenize import PromptBody
from chunkllama_server.transport.errors import invalid
from chunkllama_server.transport.request_context import RequestInfo

_SHARED = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)


async def body_token_ids(body: PromptBody, context: ServerContext, info: RequestInfo) -> list[int]:
    """Return the token ids of a prompt, or of a conversation through the chat template.

    Raises:
        ApiError: 400 naming the field.
    """
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Send either prompt or messages", "prompt")
    if isinstance(body.prompt, list):
        return body.prompt
    if body.prompt is not None:
        return await context.text.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    chat = ChatCompletionRequest.model_construct(
        model=body.model or context.settings.model_names[0],
        **{name: getattr(body, name) for name in _SHARED},
    )
    return (await prepare_chat(chat, context, info)).prompt.token_ids
