"""What the middleware knows of one HTTP request, and the headers every response carries."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkllama.logger import request_id_context
from chunkllama.messages import CacheExplanation
from chunkllama_server.transport.error_shapes import error_shape
from chunkllama_server.transport.errors import SHAPED, SPELLED, as_api_error, spelled_path
from chunkllama_server.transport.paths import canonical_path
from chunkllama_server.transport.pieces import in_pieces
from chunkllama_server.transport.rate_limit import RateLimiter, TokenCharge

_CLEAN_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_UNCLEAN_FIELD = re.compile(r"[^A-Za-z0-9_.\[\]-]")
MAX_NAMED_FIELDS = 20
_SCOPE_KEY = "chunkllama.request_info"


@dataclass(slots=True)
class RequestInfo:
    """One HTTP request.

    Attributes:
        started: monotonic seconds.
        wants_explanation: the client sent ``x-chunkllama-explain: 1``.
        tenant: whose API key it carries; "" without keys and for operators.
        headers: added to its response.
        rates: rate limits of its tenant; their headers are added, too.
        charge: tokens it was charged for.
        adapter: that its model name stands for; "" is the base model.
        is_batch: it is a line of a batch, which is served after other requests of its tenant.
        runs_on: its work goes on after it has ended, and settles the charge.
        is_admin: it came through the admin port, whose middleware has admitted it.
        body_bytes: of its body, once that was read.
        harmless, unknown: paths of the body's fields that have no effect, as the translation of
            its dialect found them: known to have none, and unknown.
        spelled: paths of translated fields here, and as the client wrote them.
    """

    request_id: str
    started: float
    tenant: str = ""
    is_operator: bool = False
    wants_explanation: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    rates: RateLimiter = field(default_factory=RateLimiter)
    charge: TokenCharge = field(default_factory=TokenCharge)
    adapter: str = ""
    is_batch: bool = False
    runs_on: bool = False
    is_admin: bool = False
    body_bytes: int = 0
    harmless: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)

    def name_ignored_fields(self, paths: list[str]) -> None:
        """Tell the client which fields were ignored, cleaned of anything a header must not
        carry."""
        self._name("x-chunkllama-ignored-fields", paths)

    def name_left_out(self, paths: list[str]) -> None:
        """Tell the client which parts of translated fields were ignored, by the names it sent."""
        self.name_ignored_fields([spelled_path(self.spelled, path) for path in paths])

    def name_repairs(self, paths: list[str]) -> None:
        """Tell the client which parts of the conversation's past were repaired or left out."""
        self._name("x-chunkllama-repaired-history", paths)

    def _name(self, header: str, paths: list[str]) -> None:
        if paths:
            names = [_UNCLEAN_FIELD.sub("_", path)[:64] or "_" for path in paths[:MAX_NAMED_FIELDS]]
            earlier = self.headers.get(header)
            self.headers[header] = ", ".join([*([earlier] if earlier else []), *names])

    def name_explanation(self, explanation: CacheExplanation) -> None:
        """Tell the client why the prompt's match in the cache ended, without any text of it."""
        self._add(
            "x-chunkllama-cache-explanation",
            f"{explanation.reason}; matched={explanation.num_matched_tokens}; "
            f"known={explanation.num_known_tokens}",
        )

    def _add(self, header: str, value: str) -> None:
        earlier = self.headers.get(header)
        self.headers[header] = value if earlier is None else f"{earlier}, {value}"[:4096]

    def name_pin(self, granted: bool) -> None:
        """Tell the client whether its prefix is kept, or the pin budget was used up."""
        self.headers["x-chunkllama-cache-pin"] = "granted" if granted else "over-budget"


def request_info(scope: Scope) -> RequestInfo:
    info = scope[_SCOPE_KEY]
    assert isinstance(info, RequestInfo)
    return info


class RequestInfoMiddleware:
    """Gives each request an id and each response ``x-request-id`` and ``openai-processing-ms``.

    A client's own x-request-id is echoed if it is clean, else replaced. What no handler foresaw is
    answered here, so that it has an id too.
    A path may begin with the ``root_path`` that a proxy has not stripped.

    Args:
        on_refusal: called with the status of each refusal.
        is_admin: these are the requests of the admin port.
    """

    def __init__(
        self,
        app: ASGIApp,
        root_path: str,
        on_refusal: Callable[[int], None],
        *,
        is_admin: bool = False,
    ) -> None:
        self._app = app
        self._root_path = root_path
        self._on_refusal = on_refusal
        self._is_admin = is_admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        clean = _CLEAN_REQUEST_ID.fullmatch(given)
        info = RequestInfo(
            request_id=given.decode() if clean else f"req_{uuid.uuid4().hex}",
            started=time.monotonic(),
            is_admin=self._is_admin,
            wants_explanation=headers.get(b"x-chunkllama-explain", b"") in (b"1", b"true"),
        )
        scope[_SCOPE_KEY] = info
        scope[SPELLED] = info.spelled
        request_id_context.set(info.request_id)
        path = canonical_path(scope["path"], self._root_path, keep_root=False)
        shape = error_shape(path, headers)
        if shape is not None:
            scope[SHAPED] = lambda error: shape.response(error, info.request_id)
            if shape.id_header is not None:
                info.headers[shape.id_header] = info.request_id
        if self._root_path:
            scope["root_path"] = self._root_path
        send = in_pieces(send)

        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                if message["status"] >= 400:
                    self._on_refusal(message["status"])
                elapsed_ms = int((time.monotonic() - info.started) * 1000)
                extra = {
                    "x-request-id": info.request_id,
                    "openai-processing-ms": str(elapsed_ms),
                    **info.rates.headers(),
                    **info.headers,
                }
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode("latin-1")) for name, value in extra.items()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if has_begun:
                raise
            await as_api_error(error).response(scope)(scope, receive, send_with_headers)
