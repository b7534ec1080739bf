"""API keys and cache namespaces: every route is protected unless it is on the short open list."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from chunkllama_server.config.api_settings import ApiSettings
from chunkllama_server.transport.errors import ApiError
from chunkllama_server.transport.request_context import request_info

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/dashboard"})


def bearer_token(scope: Scope) -> bytes | None:
    """The key of ``Authorization: Bearer ...``, or of ``x-api-key``; None when neither is there."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    authorization = headers.get(b"authorization", b"")
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")


def tenant_of_key(token: bytes, api_keys: Mapping[str, str]) -> str | None:
    """The tenant a key belongs to; every key is compared, each in constant time."""
    found = None
    for tenant, key in api_keys.items():
        if hmac.compare_digest(token, key.encode()):
            found = tenant
    return found


def cache_namespace(settings: ApiSettings, tenant: str, cache_salt: str | None) -> str:
    """The namespace a request may read and write below the public prefix; "" shares with everyone.

    A salt only narrows: it is hashed together with the tenant, never instead of it. Each field goes
    in with its length, so ("org_1", "2345") and ("org_12345", "") differ.
    """
    scope_tenant = tenant if settings.isolates_tenants else ""
    if not scope_tenant and not cache_salt:
        return ""
    digest = hmac.new(settings.namespace_secret, digestmod=hashlib.sha256)
    for value in (scope_tenant, cache_salt or ""):
        encoded = value.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:32]


class AuthMiddleware:
    """Asks for a key on every path but the open ones, going by the raw ASGI path alone.

    The URL is never rebuilt from the Host header, so no header can move a request to an open path.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._keys = settings.api_keys
        self._root_path = settings.root_path

    def _is_open(self, path: str) -> bool:
        return path.removeprefix(self._root_path) in OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        token = bearer_token(scope)
        tenant = tenant_of_key(token, self._keys) if token else None
        if tenant is None:
            message = "Incorrect API key provided" if token else "You didn't provide an API key"
            error = ApiError(401, message, code="invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            await error.response()(scope, receive, send)
            return
        request_info(scope).tenant = tenant
        await self._app(scope, receive, send)
