"""The one error body."""

from __future__ import annotations

from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """What went wrong; ``param`` is the exact path of the offending field, ``code`` is for
    machines."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every response that is not a success."""

    error: ErrorDetail
