"""/dashboard/requests: response schemas."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class LiveRequestState(TypedDict):
    """A request that waits for its first token, or runs; its age counts from its arrival.

    ``client_request_id`` is its ``x-request-id``, which the log names.
    """

    request_id: str
    client_request_id: str
    tenant: str
    state: Literal["waiting", "running"]
    age_seconds: float
    prompt_tokens: int
    choices: int


class LiveRequests(TypedDict):
    """The live requests that the caller may see, the oldest first.

    ``may_abort`` says whether the caller may end them; ``hidden`` are beyond the longest list.
    """

    object: Literal["requests"]
    may_abort: bool
    hidden: int
    data: list[LiveRequestState]


class EndedTenant(TypedDict):
    """All requests of a tenant that were ended on demand."""

    object: Literal["ended"]
    tenant: str
    count: int


class Ended(TypedDict):
    """Requests that were ended on demand: one, or all with this ``x-request-id``."""

    object: Literal["ended"]
    request_id: str
    count: int
