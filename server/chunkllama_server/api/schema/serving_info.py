"""GET /server_info, /model_info and /v1/loads: response schemas, by the names that SGLang uses."""

from __future__ import annotations

from typing_extensions import TypedDict


class ServerInfo(TypedDict):
    """What a router learns of a server; sizes are tokens."""

    model_path: str
    served_model_name: str
    version: str
    tp_size: int
    dp_size: int
    pp_size: int
    is_embedding: bool
    page_size: int
    context_length: int
    max_total_tokens: int
    max_running_requests: int


class ModelInfo(TypedDict):
    """What a router learns of a model."""

    model_path: str
    is_generation: bool
    has_image_understanding: bool
    has_audio_understanding: bool


class Load(TypedDict):
    """Load of one replica, or a tenant's part of it.

    ``token_usage`` is the part of the K/V pool that requests use, in [0, 1].
    """

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float


class Loads(TypedDict):
    """The load now, at an ISO 8601 time."""

    timestamp: str
    version: str
    loads: list[Load]
