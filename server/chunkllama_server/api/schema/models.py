"""GET /v1/models, /version and health: response schemas."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class Model(TypedDict):
    """A served model; ``chat_template`` is what its chat template can express.

    ``max_request_tokens`` are the tokens of a prompt and its answer that fit the context and the
    K/V pool. ``max_model_len`` is the same number, by the name that clients of vLLM read.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_request_tokens: int
    max_model_len: int
    chat_template: dict[str, Any] | None


class ModelList(TypedDict):
    """All served models."""

    object: Literal["list"]
    data: list[Model]


class Version(TypedDict):
    """The server's version."""

    version: str


class Health(TypedDict):
    """``status`` is ok."""

    status: Literal["ok"]
