"""Store responses in valkey, where all servers of a cluster find them."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from urllib.parse import urlsplit

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama_server.api.common.response_store import (
    PackedResponse,
    StoredResponse,
    response_of,
)
from chunkllama_server.transport.errors import unavailable

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

logger = init_logger(__name__)

T = TypeVar("T")
_SECONDS: Final = 5.0  # for one command
_FIELDS: Final = ("response", "messages", "input_items", "tools", "events")
_CHECKSUM: Final = "checksum"
_FORMAT: Final = 2  # of what is stored; servers of another format do not see it


class ValkeyResponses:
    """Responses as hashes that expire, a sorted set of each tenant's ids, and its items' responses.

    How much is kept is bounded by each response's age and size, the tenant's own quota, and
    valkey's ``maxmemory``.

    Args:
        url: valkey://[:password@]host:port[/database], valkeys:// for TLS,
            or unix:///socket.
        max_bytes: of one response; a larger one is not stored.
        ttl_seconds: age at which a response expires.

    Raises:
        ConfigError: the URL cannot be read.
    """

    def __init__(self, url: str, max_bytes: int, ttl_seconds: float) -> None:
        from valkey.asyncio import Valkey
        from valkey.exceptions import ValkeyError

        self._max_bytes = max_bytes
        self._milliseconds = max(round(1000 * ttl_seconds), 1)
        self._errors: tuple[type[Exception], ...] = (ValkeyError, OSError, TimeoutError)
        try:
            parts = urlsplit(url)
            # without the password, and as the client fills in what is left out
            self._address = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
            if parts.scheme == "unix":
                self._address = parts.path
            self._valkey: Valkey = Valkey.from_url(
                url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS
            )
            # The URL's options are checked where a connection is made, each in its own way.
            self._valkey.connection_pool.make_connection()
        except (ValueError, TypeError, AttributeError, ValkeyError) as error:
            raise ConfigError(f"response_store: cannot use the URL: {_line(error)}") from None

    async def check(self) -> None:
        """Check that the server answers.

        Raises:
            ConfigError: it does not.
        """
        try:
            await _awaited(self._valkey.ping())
        except self._errors as error:
            raise ConfigError(
                f"response_store: {self._address} does not answer: {_line(error)}"
            ) from None

    async def put(self, tenant: str, stored: StoredResponse, max_items: int | None) -> None:
        """Store a response. One that cannot be stored is left out, with a warning."""
        packed = await asyncio.to_thread(PackedResponse.of, stored)
        if max(packed.num_bytes, packed.text_bytes) > self._max_bytes:
            return
        try:
            await self._put(tenant, stored, packed, max_items)
        except self._errors as error:
            logger.warning("a response is not stored: %s: %s", self._address, _line(error))

    async def _put(
        self, tenant: str, stored: StoredResponse, packed: PackedResponse, max_items: int | None
    ) -> None:
        response_id, now = stored.response["id"], time.time()
        key, ids = _key("response", tenant, response_id), _key("ids", tenant)
        async with self._valkey.pipeline(transaction=True) as commands:
            parts = {name: getattr(packed, name) for name in _FIELDS}
            commands.hset(key, mapping={**parts, _CHECKSUM: _checksum(parts.values())})
            commands.pexpire(key, self._milliseconds)
            for item_id in stored.item_ids():
                commands.set(_key("item", tenant, item_id), response_id, px=self._milliseconds)
            commands.zremrangebyscore(ids, "-inf", now - self._milliseconds / 1000)
            commands.zadd(ids, {response_id: now})
            commands.pexpire(ids, self._milliseconds)
            await commands.execute()
        if max_items is not None:
            count = await _awaited(self._valkey.zcard(ids))
            if count > max_items:
                for oldest, _ in await self._valkey.zpopmin(ids, count - max_items):
                    await self._valkey.delete(_key("response", tenant, oldest.decode()))

    async def get(self, tenant: str, response_id: str) -> PackedResponse | None:
        """Return a stored response of this tenant; what this server has not written is none.

        Raises:
            ApiError: 503 when valkey does not answer.
        """
        key = _key("response", tenant, response_id)
        found = await self._ask(_awaited(self._valkey.hmget(key, [*_FIELDS, _CHECKSUM])))
        *parts, checksum = cast("list[bytes | None]", found)
        given = [part for part in parts if part is not None]
        if len(given) < len(parts) or checksum != _checksum(given):
            return None
        return PackedResponse(*given)

    async def with_items(self, tenant: str, item_ids: list[str]) -> list[str | None]:
        """Return the id of the tenant's stored response that has each item, None for none.

        Raises:
            ApiError: 503 when valkey does not answer.
        """
        keys = [_key("item", tenant, item_id) for item_id in item_ids]
        found: list[bytes | None] = await self._ask(self._valkey.mget(keys))
        missing = [item_id for item_id, each in zip(item_ids, found, strict=True) if each is None]
        named = {response_id for each in missing if (response_id := response_of(each))}
        existing = await self._existing(tenant, sorted(named))
        return [
            each.decode() if each is not None else existing.get(response_of(item_id) or "")
            for item_id, each in zip(item_ids, found, strict=True)
        ]

    async def _existing(self, tenant: str, response_ids: list[str]) -> dict[str, str]:
        """Return those of some ids that a response is stored under, by themselves."""
        async with self._valkey.pipeline(transaction=False) as commands:
            for response_id in response_ids:
                commands.exists(_key("response", tenant, response_id))
            found = await self._ask(commands.execute())
        pairs = zip(response_ids, found, strict=True)
        return {response_id: response_id for response_id, is_stored in pairs if is_stored}

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response; returns False when there is none.

        Raises:
            ApiError: 503 when valkey does not answer.
        """
        deleted: int = await self._ask(self._valkey.delete(_key("response", tenant, response_id)))
        await self._ask(_awaited(self._valkey.zrem(_key("ids", tenant), response_id)))
        return deleted > 0

    async def close(self) -> None:
        """Close the connections."""
        await self._valkey.aclose()

    async def _ask(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except self._errors as error:
            logger.warning("%s does not answer: %s", self._address, _line(error))
            raise unavailable(
                "The store of responses does not answer", "response_store_unavailable"
            ) from None


def _key(kind: str, tenant: str, name: str = "") -> str:
    """Return a key; the length tells where the tenant's name ends."""
    return f"chunkllama:{_FORMAT}:{kind}:{len(tenant)}:{tenant}:{name}"


def _checksum(parts: Iterable[bytes]) -> bytes:
    """Return what tells an entry that can be read from one that is damaged."""
    return b"%d" % reduce(lambda so_far, part: zlib.crc32(part, so_far), parts, 0)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _awaited(answer: Any) -> Awaitable[Any]:
    """Type an answer whose type names the synchronous client's, too."""
    return cast("Awaitable[Any]", answer)
