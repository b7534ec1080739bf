"""Find whose an API key is, in the same time however many keys there are."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping


class KeyIndex:
    """Tenants by digests of their API keys.

    The digests are keyed, so that the time of a look-up says nothing about the keys: who sends one
    does not know its digest. To compare a key with each of thousands would take milliseconds of the
    event loop, for a client without a key too.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._tenants: dict[bytes, str] = {}

    def replace(self, keys: Mapping[str, str]) -> None:
        """Know these keys, by the names of their tenants, and no others."""
        self._tenants = {self._digest(key.encode()): tenant for tenant, key in keys.items()}

    def tenant_of(self, token: bytes) -> str | None:
        """Return the tenant a key belongs to, None for one that is not known."""
        return self._tenants.get(self._digest(token))

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=32, key=self._secret).digest()
