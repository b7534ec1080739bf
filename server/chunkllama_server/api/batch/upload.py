"""Receive an uploaded file: who may send one is checked before its body is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from fastapi import Request
from starlette.datastructures import FormData

from chunkllama_server.api.batch.runner import BatchRunner
from chunkllama_server.api.batch.store import FileStore
from chunkllama_server.api.common.context import ServerContext, get_context
from chunkllama_server.transport.body import JsonRoute
from chunkllama_server.transport.errors import ApiError, exceeded
from chunkllama_server.transport.forms import form_boundary, read_form
from chunkllama_server.transport.request_context import request_info

_MAX_FIELDS = 3  # purpose and the two of expires_after


async def open_runner(context: ServerContext) -> BatchRunner:
    """The runner of this server, with its store open.

    Raises:
        ApiError: 404 where files are turned off, 503 where the folder cannot be used.
    """
    runner = context.batches
    if runner is None:
        raise ApiError(
            404, "Files and batches are turned off on this server", code="files_disabled"
        )
    await runner.open()
    return runner


class UploadRoute(JsonRoute):
    """A route whose form has one file, for which there is room."""

    async def read_form(self, request: Request) -> FormData:
        """Return the parts of a form.

        The bytes that arrive are taken from the tenant's budget, those that Content-Length
        promises at once.

        Raises:
            ApiError: 400 or 415 for another body, 403 for a web page's, 413 beyond the budget, 429
                beyond ``max_uploads``, 503 while nothing can be stored.
        """
        try:
            return await _receive(request)
        except ApiError as error:
            # The rest of the body is not read, so the connection cannot be used again.
            error.headers = {**(error.headers or {}), "connection": "close"}
            raise


@contextlib.contextmanager
def _arriving(store: FileStore, tenant: str, most: int) -> Iterator[Callable[[int], None] | None]:
    """Count an upload while it arrives, and what it takes of the tenant's budget.

    Args:
        most: uploads of a tenant at once.

    Yields:
        What reserves more bytes or raises 413; None where there are ``most`` already.
    """
    if store.num_arriving[tenant] >= most:
        yield None
        return
    reserved = 0

    def take(num_bytes: int) -> None:
        nonlocal reserved
        store.reserve(tenant, num_bytes)
        reserved += num_bytes

    store.num_arriving[tenant] += 1
    try:
        yield take
    finally:
        store.release(tenant, reserved)
        store.num_arriving[tenant] -= 1


async def _receive(request: Request) -> FormData:
    context = await get_context(request)
    context.check_serving()
    boundary = form_boundary(request.headers)
    if "origin" in request.headers and not context.settings.cors_origins:
        # A web page can send a form to any server without asking.
        raise ApiError(403, "Browsers may not upload files to this server", code="origin")
    store = (await open_runner(context)).store
    promised = int(request.headers.get("content-length", "0"))
    with _arriving(store, request_info(request.scope).tenant, context.settings.max_uploads) as take:
        if take is None:
            error = exceeded(context.settings, "max_uploads")
            error.headers = {"Retry-After": "1"}
            raise error
        take(promised)
        on_block = (lambda _: None) if promised else take
        return await read_form(boundary, request.stream(), _MAX_FIELDS, on_block)
