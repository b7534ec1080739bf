"""API keys, cache namespaces and rate limits; every route but the open ones needs a key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkllama.logger import tenant_context
from chunkllama_server.config.tenants import NO_QUOTAS, TenantQuotas
from chunkllama_server.transport.errors import ApiError
from chunkllama_server.transport.internal import INTERNAL_TENANT
from chunkllama_server.transport.key_index import KeyIndex
from chunkllama_server.transport.paths import canonical_path
from chunkllama_server.transport.rate_limit import RateLimiter
from chunkllama_server.transport.request_context import request_info

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/dashboard"})
# Where these methods read: it says that the server runs, and POST generates.
OPEN_ROOT_METHODS = frozenset({"GET", "HEAD"})
OPERATOR_PATHS = frozenset(
    {
        *("/metrics", "/v1/usage", "/dashboard/data", "/dashboard/tenants"),
        *("/dashboard/divergence", "/dashboard/requests", "/dashboard/history"),
        *("/v1/loads", "/server_info", "/model_info"),
    }
)
# What an operator's key may change on the main port.
OPERATOR_CHANGES = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def bearer_token(scope: Scope) -> bytes | None:
    """The key of ``Authorization: Bearer ...``, or of ``x-api-key``; None when neither is there."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    authorization = headers.get(b"authorization", b"")
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")


@dataclass(frozen=True, slots=True)
class Tenants:
    """API keys, and the cache namespace and quotas of each tenant.

    Attributes:
        keys: tenant name to API key; empty admits requests without a key. ``set_keys`` changes the
            mapping in place.
        isolation: ``tenant`` gives each key its own cache namespace, ``off`` shares one; None is
            ``tenant`` with keys, even with one key, because a reload may add more.
        operator_keys: read every tenant's part of ``OPERATOR_PATHS``, may POST to
            ``OPERATOR_CHANGES``, and nothing else.
        clock: monotonic seconds, of the rate limits.
    """

    keys: dict[str, str] = field(default_factory=dict, repr=False)
    isolation: Literal["off", "tenant"] | None = None
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    operator_keys: tuple[str, ...] = field(default=(), repr=False)
    clock: Callable[[], float] = time.monotonic
    _quotas: dict[str, TenantQuotas] = field(default_factory=dict)
    _limiters: dict[str, RateLimiter] = field(default_factory=dict, repr=False)
    _index: KeyIndex = field(default_factory=KeyIndex, init=False, repr=False)

    def __post_init__(self) -> None:
        self._index.replace(self.keys)

    def set_keys(self, keys: Mapping[str, str]) -> None:
        """Replace all keys, for those too that hold the mapping."""
        found = dict(keys)
        self.keys.clear()
        self.keys.update(found)
        self._index.replace(found)

    def tenant_of(self, token: bytes) -> str | None:
        """Return the tenant a key belongs to, None for one that is not known."""
        return self._index.tenant_of(token)

    def set_quotas(self, quotas: Mapping[str, TenantQuotas]) -> None:
        """Replace the quotas of all tenants; what is left of a rate stays in proportion."""
        self._quotas.clear()
        self._quotas.update(quotas)
        for tenant, limiter in self._limiters.items():
            limiter.set_quotas(self.quotas(tenant))

    def has_key(self, tenant: str) -> bool:
        """Whether a tenant may send requests."""
        return tenant in self.keys if self.keys else not tenant

    def quotas(self, tenant: str) -> TenantQuotas:
        """Return a tenant's quotas."""
        return self._quotas.get(tenant, NO_QUOTAS)

    def limiter(self, tenant: str) -> RateLimiter:
        """Return a tenant's rate limits."""
        found = self._limiters.get(tenant)
        if found is None:
            found = self._limiters[tenant] = RateLimiter(self.quotas(tenant), self.clock)
        return found

    def take_spent(self) -> dict[str, tuple[float, float]]:
        """Requests and tokens of limited rates that tenants have spent since the last call."""
        found = {tenant: limiter.take_spent() for tenant, limiter in self._limiters.items()}
        return {tenant: spent for tenant, spent in found.items() if any(spent)}

    def charge_elsewhere(self, spent: Mapping[str, tuple[float, float]]) -> None:
        """Charge tenants for what they have spent at another server."""
        for tenant, (requests, tokens) in spent.items():
            if self.has_key(tenant):
                self.limiter(tenant).charge_elsewhere(requests, tokens)

    @property
    def are_isolated(self) -> bool:
        """Whether each tenant has its own cache namespace."""
        return bool(self.keys) if self.isolation is None else self.isolation == "tenant"

    def is_operator(self, token: bytes) -> bool:
        """Whether a key is an operator's; every key is compared, each in constant time."""
        matches = [hmac.compare_digest(token, key.encode()) for key in self.operator_keys]
        return any(matches)

    def namespace(self, tenant: str, cache_salt: str | None) -> str:
        """Return the namespace below the public prefix that a request uses; "" is shared by all.

        A salt is hashed together with the tenant, so it only narrows. Each field is preceded by its
        length, so that ("org_1", "2345") and ("org_12345", "") differ.
        """
        scope_tenant = tenant if self.are_isolated else ""
        return keyed_namespace(self._secret, scope_tenant, cache_salt or "")


def keyed_namespace(secret: bytes, tenant: str, cache_salt: str) -> str:
    """Return the namespace of a tenant's chunks; "" is shared by all."""
    if not tenant and not cache_salt:
        return ""
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for value in (tenant, cache_salt):
        encoded = value.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:32]


def _unauthorized(token: bytes | None) -> ApiError:
    message = "Incorrect API key provided" if token else "You didn't provide an API key"
    error = ApiError(401, message, code="invalid_api_key")
    error.headers = {"WWW-Authenticate": "Bearer"}
    return error


class AdminAuthMiddleware:
    """Admits requests of the admin port that change something from operators alone.

    Reading needs no key. Where operators have keys, everything else needs one of them; where they
    have none, it is served to this machine alone.

    Args:
        is_local: whether only this machine reaches the port.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants, is_local: bool) -> None:
        self._app = app
        self._tenants = tenants
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _READING:
            error = self._refusal(bearer_token(scope))
            if error is not None:
                await error.response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, token: bytes | None) -> ApiError | None:
        if self._tenants.operator_keys:
            return None if token and self._tenants.is_operator(token) else _unauthorized(token)
        if self._is_local:
            return None
        return ApiError(
            403,
            "Changes through an admin port that other machines reach need an operator_key",
            code="operator_key",
        )


class AuthMiddleware:
    """Asks for a key on every path but the open ones, going by the raw ASGI path alone.

    The URL is never rebuilt from the Host header, so no header can move a request to an open path.
    A POST counts as one of its tenant's requests per minute before its body is read.

    Args:
        on_rejection: called with the tenant and the reason when a quota refuses a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        tenants: Tenants,
        root_path: str,
        on_rejection: Callable[[str, str], None],
    ) -> None:
        self._app = app
        self._tenants = tenants
        self._keys = tenants.keys
        self._root_path = root_path
        self._on_rejection = on_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if INTERNAL_TENANT in scope:
            info = request_info(scope)
            info.tenant, info.is_batch = scope[INTERNAL_TENANT], True
            tenant_context.set(info.tenant)
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not self._keys:
            await self._app(scope, receive, send)
            return
        # An open path has to be spelled exactly, but for a trailing slash.
        path = scope["path"].removeprefix(self._root_path).rstrip("/")
        if path in OPEN_PATHS or (not path and scope["method"] in OPEN_ROOT_METHODS):
            await self._app(scope, receive, send)
            return
        token = bearer_token(scope)
        tenant = self._tenants.tenant_of(token) if token else None
        if token and self._tenants.is_operator(token):
            path = canonical_path(scope["path"], self._root_path, keep_root=False)  # as routed
            if path not in OPERATOR_PATHS | OPERATOR_CHANGES:
                error = ApiError(
                    403,
                    "An operator's key reads metrics, usage and the dashboard, and loads adapters",
                    code="operator_key",
                )
                await error.response(scope)(scope, receive, send)
                return
            request_info(scope).is_operator = True
            tenant = ""
        if tenant is None:
            await _unauthorized(token).response(scope)(scope, receive, send)
            return
        tenant_context.set(tenant)
        await self._serve(tenant, scope, receive, send)

    async def _serve(self, tenant: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request within its tenant's rate limits."""
        info = request_info(scope)
        info.tenant = tenant
        if tenant:
            info.rates = self._tenants.limiter(tenant)
        if scope["method"] == "POST":
            try:
                info.rates.take_request()
            except ApiError as error:
                self._on_rejection(tenant, "requests")
                await error.response(scope)(scope, receive, send)
                return

        def settle() -> None:
            if not info.runs_on:
                info.charge.settle()

        async def send_settled(message: Message) -> None:
            # before the end is sent, or the client's next request would meet the whole estimate
            if message["type"] == "http.response.body" and not message.get("more_body"):
                settle()
            await send(message)

        try:
            await self._app(scope, receive, send_settled)
        finally:
            settle()
