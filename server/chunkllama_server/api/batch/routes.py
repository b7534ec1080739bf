"""Serve /v1/files and /v1/batches: stored files, and jobs that run their lines."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Form, Query, Request, UploadFile
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from chunkllama_server.api.batch.records import StoredBatch, StoredFile
from chunkllama_server.api.batch.store import FileStore, Purpose
from chunkllama_server.api.batch.upload import UploadRoute, open_runner
from chunkllama_server.api.common.context import Context, ServerContext
from chunkllama_server.api.common.paging import page_of
from chunkllama_server.api.openapi import refusals
from chunkllama_server.api.schema.batch import (
    MESSAGES,
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
)
from chunkllama_server.transport.errors import ApiError, exceeded, invalid
from chunkllama_server.transport.paths import ASKED_METHOD
from chunkllama_server.transport.request_context import request_info

router = APIRouter(route_class=UploadRoute, tags=["batch"])

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MIN_SECONDS, _MAX_SECONDS = 3600, 2_592_000  # of a file
_MAX_WINDOW = 2_592_000
_BLOCK = 1 << 20
_FILE_NAME_CHARS = 256
_GET = refusals(400, 401, 404, 405, 503)
_POST = refusals(400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _missing(kind: str, name: str) -> ApiError:
    return ApiError(404, f"No {kind} {name[:100]!r} is stored", f"{kind}_id", f"{kind}_not_found")


# -- files ------------------------------------------------------------------------------------


@router.post("/v1/files", responses=_POST)
async def upload_file(
    request: Request,
    context: Context,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]")] = None,
) -> FileObject:
    """Store a file of lines for a batch, or of conversations to train on."""
    if purpose not in ("batch", "fine-tune"):
        raise invalid("purpose must be batch or fine-tune", "purpose", "unsupported")
    if anchor not in (None, "created_at"):
        raise invalid("anchor must be created_at", "expires_after.anchor")
    if seconds is not None and not _MIN_SECONDS <= seconds <= _MAX_SECONDS:
        raise invalid(f"seconds must be {_MIN_SECONDS} to {_MAX_SECONDS}", "expires_after.seconds")
    store = (await open_runner(context)).store
    name = (file.filename or "file")[:_FILE_NAME_CHARS]
    tenant = request_info(request.scope).tenant
    kind: Purpose = "batch" if purpose == "batch" else "fine-tune"
    return await store.add_file(tenant, name, _blocks(file.file), file.size or 0, seconds, kind)


@router.get("/v1/files", response_model=FileList, responses=_GET)
async def list_files(
    request: Request,
    context: Context,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the key's files."""
    store = (await open_runner(context)).store
    tenant = request_info(request.scope).tenant
    store.expire()
    records = [
        record for record in store.files.of(tenant) if purpose in (None, record.value["purpose"])
    ]
    page, has_more = page_of(
        records if order == "desc" else records[::-1], limit, after, lambda record: record.id
    )
    listed: FileList = {
        "object": "list",
        "data": [record.value for record in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": has_more,
    }
    return await context.respond(len(page) * len(FileObject.__annotations__), lambda: listed)


def _file(store: FileStore, tenant: str, file_id: str) -> StoredFile:
    store.expire()
    found = store.files.get(file_id, tenant)
    if found is None:
        raise _missing("file", file_id)
    return found


@router.get("/v1/files/{file_id}", responses=_GET)
async def get_file(file_id: str, request: Request, context: Context) -> FileObject:
    """Describe a file."""
    return _file(
        (await open_runner(context)).store, request_info(request.scope).tenant, file_id
    ).value


class _Content(FileResponse):
    """The content of a file, which HEAD does not read.

    Raises (when it is sent):
        ApiError: 400 for a Range header that is malformed, 416 for one beyond the file.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_refuse(message: Message) -> None:
            status = message.get("status", 200)
            if status >= 400:  # with a text of starlette
                text = "The Range header is malformed"
                if status == 416:
                    text = "The Range header asks for no part of the file"
                error = ApiError(status, text, "range", "invalid_range")
                if status == 416:
                    error.headers = {"content-range": f"bytes */{self.headers['content-length']}"}
                raise error
            await send(message)

        asked = {**scope, "method": scope.get(ASKED_METHOD, scope["method"])}
        await super().__call__(asked, receive, send_or_refuse)


@router.get(
    "/v1/files/{file_id}/content",
    response_model=None,
    responses={200: {"content": {"application/jsonl": {}}}, **_GET, **refusals(416)},
)
async def get_content(file_id: str, request: Request, context: Context) -> Response:
    """Return a file's content."""
    store, tenant = (await open_runner(context)).store, request_info(request.scope).tenant
    found = _file(store, tenant, file_id)
    path = store.file_path(tenant, file_id)
    if path is None:
        raise _missing("file", file_id)
    try:
        status = await store.work(path.stat)
    except FileNotFoundError:  # it has been deleted meanwhile
        raise _missing("file", file_id) from None
    return _Content(
        path,
        media_type="application/jsonl",
        filename=found.value["filename"],
        stat_result=status,
    )


@router.delete("/v1/files/{file_id}", responses=_GET)
async def delete_file(file_id: str, request: Request, context: Context) -> DeletedFile:
    """Delete a file; a job that reads it fails."""
    if not (await open_runner(context)).store.delete_file(
        request_info(request.scope).tenant, file_id
    ):
        raise _missing("file", file_id)
    return {"id": file_id, "object": "file", "deleted": True}


# -- jobs -------------------------------------------------------------------------------------


def _new_batch(body: BatchRequest, now: int) -> BatchObject:
    window = body.completion_window
    seconds = int(window[:-1]) * _UNIT_SECONDS[window[-1]]
    if seconds > _MAX_WINDOW:
        raise invalid(f"At most {_MAX_WINDOW // 86_400}d, got {window}", "completion_window")
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + seconds,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": body.metadata,
    }


@router.post("/v1/batches", responses=_POST)
async def create_batch(body: BatchRequest, request: Request, context: Context) -> BatchObject:
    """Run the lines of a file in the background."""
    info = await context.admit(body, request)
    runner = await open_runner(context)
    if body.endpoint == MESSAGES and "anthropic" not in context.settings.protocols:
        raise invalid("Anthropic's API is turned off on this server", "endpoint", "unsupported")
    store = runner.store
    stored = _file(store, info.tenant, body.input_file_id)
    if stored.value["purpose"] != "batch":
        raise invalid("The file's purpose is not batch", "input_file_id")
    active = [job for job in store.batches.of(info.tenant) if not job.has_ended]
    if len(active) >= context.settings.batch_jobs:
        raise exceeded(context.settings, "batch_jobs", None)
    expiry = body.output_expires_after
    record = StoredBatch(
        info.tenant, _new_batch(body, store.now()), None if expiry is None else expiry.seconds
    )
    await store.add_batch(record)
    runner.start(record)
    return record.value


async def _batch(context: ServerContext, request: Request, batch_id: str) -> StoredBatch:
    store = (await open_runner(context)).store
    found = store.batches.get(batch_id, request_info(request.scope).tenant)
    if found is None:
        raise _missing("batch", batch_id)
    return found


@router.get("/v1/batches/{batch_id}", responses=_GET)
async def get_batch(batch_id: str, request: Request, context: Context) -> BatchObject:
    """Describe a job: its status, lines and tokens so far."""
    return (await _batch(context, request, batch_id)).value


@router.post("/v1/batches/{batch_id}/cancel", responses=_POST)
async def cancel_batch(batch_id: str, request: Request, context: Context) -> BatchObject:
    """End a job; its results so far become files."""
    record = await _batch(context, request, batch_id)
    await (await open_runner(context)).cancel(record)
    return record.value


@router.get("/v1/batches", responses=_GET)
async def list_batches(
    request: Request,
    context: Context,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> BatchList:
    """List the key's jobs, newest first."""
    store = (await open_runner(context)).store
    tenant = request_info(request.scope).tenant
    page, has_more = page_of(store.batches.of(tenant), limit, after, lambda record: record.id)
    return {
        "object": "list",
        "data": [record.value for record in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": has_more,
    }
