"""/v1/files and /v1/batches: request and answer schemas."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NotRequired

import msgspec
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from chunkllama_server.api.schema.base import RequestModel

MESSAGES = "/v1/messages"
_WINDOW = "^[0-9]{1,5}[smhd]$"
_KEY_CHARS, _VALUE_CHARS = 64, 512  # of metadata


def _check_window(value: str) -> str:
    if re.fullmatch(_WINDOW, value) is None:
        raise PydanticCustomError("window", "Send a number with its unit s, m, h or d, such as 24h")
    return value


class OutputExpiry(RequestModel):
    """When the files of results expire."""

    anchor: Literal["created_at"] = Field(description="Honoured.")
    seconds: int = Field(ge=3600, le=2_592_000, description="Honoured.")


class BatchRequest(RequestModel):
    """Body of POST /v1/batches."""

    input_file_id: str = Field(
        max_length=128, description="Honoured: an uploaded file of purpose batch."
    )
    endpoint: Literal[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
    ] = Field(description="Honoured: the url of all lines.")
    completion_window: Annotated[str, AfterValidator(_check_window)] = Field(
        json_schema_extra={"pattern": _WINDOW},
        description='Honoured: the batch expires after this time, e.g. "24h"; at most "30d".',
    )
    metadata: (
        dict[
            Annotated[str, Field(max_length=_KEY_CHARS)],
            Annotated[str, Field(max_length=_VALUE_CHARS)],
        ]
        | None
    ) = Field(default=None, max_length=16, description="Honoured: returned with the batch.")
    output_expires_after: OutputExpiry | None = Field(default=None, description="Honoured.")


class FileObject(TypedDict):
    """A stored file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output", "fine-tune"]
    status: Literal["processed"]


class FileList(TypedDict):
    """The key's files, newest first."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: bool


class RequestCounts(TypedDict):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchInputDetails(TypedDict):
    """Prompt tokens that the cache had, because an earlier line or request shared them."""

    cached_tokens: int


class BatchOutputDetails(TypedDict):
    """Tokens of thoughts."""

    reasoning_tokens: int


class BatchUsage(TypedDict):
    """Tokens of all lines; the cached ones are what sharing prefixes saved."""

    input_tokens: int
    input_tokens_details: BatchInputDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class BatchError(TypedDict):
    """A line that makes a file unusable."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(TypedDict):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchError]


BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class BatchObject(TypedDict):
    """A batch job."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: NotRequired[str | None]
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """The key's batches, newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LineAnswer(msgspec.Struct):
    """The answer to one line; its body stays text."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineResult(msgspec.Struct):
    """One line of a batch's output or error file."""

    id: str
    custom_id: str
    response: LineAnswer | None = None
    error: dict[str, Any] | None = None
