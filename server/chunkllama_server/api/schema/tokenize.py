"""POST /tokenize, /detokenize and those that end in /render: request and response schemas."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import RequestModel, TokenIds
from chunkllama_server.api.schema.chat import ChatMessage, ChatTool
from chunkllama_server.api.schema.completions import PromptIds
from chunkllama_server.api.schema.past import as_messages


class PromptBody(RequestModel):
    """A prompt, or messages."""

    model: str | None = Field(
        default=None, description="Honoured: a served model name; another is 404."
    )
    prompt: str | PromptIds | None = Field(
        default=None, description="Honoured: text, or token ids; excludes messages."
    )
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None
    ) = Field(default=None, description="Honoured: a conversation; excludes prompt.")
    _read_past = field_validator("messages", mode="before")(as_messages)
    add_special_tokens: bool | None = Field(
        default=None, description="Honoured for a prompt: whether it begins with BOS. Default true."
    )
    add_generation_prompt: bool | None = Field(default=None, description="Honoured for messages.")
    continue_final_message: bool | None = Field(default=None, description="Honoured for messages.")
    tools: Annotated[list[ChatTool], Field(max_length=128, fail_fast=True)] | None = Field(
        default=None, description="Honoured for messages."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Honoured for messages: names on the operator's list."
    )


class TokenizeRequest(PromptBody):
    """Body of POST /tokenize: a prompt, or messages."""

    prompt: str | None = Field(default=None, description="Honoured: text; excludes messages.")
    return_token_strs: bool | None = Field(
        default=None, description="Honoured: token_strs is each token's text."
    )


class TokenizeResponse(TypedDict):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: str | None = Field(
        default=None, description="Honoured: a served model name; another is 404."
    )
    tokens: TokenIds = Field(max_length=2**20, description="Honoured: ids of the vocabulary.")
    skip_special_tokens: bool | None = Field(default=None, description="Honoured. Default false.")


class DetokenizeResponse(TypedDict):
    """Text of token ids."""

    prompt: str


class RenderedPrompt(TypedDict):
    """A prompt as the model would see it.

    ``prompt_token_ids`` are the same as ``token_ids``, which routers read.
    """

    prompt: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    count: int
    max_model_len: int
