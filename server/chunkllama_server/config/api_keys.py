"""One API key of the flags or the key file."""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from chunkllama.errors import ConfigError

_MAX_CHARS: Final = 4096  # of name:key; a request's headers have 32 KiB
OTHER_TENANTS: Final = "other"  # label of /metrics for the tenants without a label of their own


class KeyEntry(NamedTuple):
    """One API key: its tenant, and quotas as text."""

    name: str
    key: str
    fields: dict[str, str]


def parse_key(text: str, number: int) -> KeyEntry:
    """Parse "name:key field=value ..." or a bare key, which is named by its hash.

    Args:
        number: of the entry, for messages.

    Raises:
        ConfigError: the text is malformed; the message shows no part of the key.
    """
    given, *words = text.split() or [""]
    name, colon, key = given.partition(":")
    if not colon:
        name, key = f"key-{hashlib.sha256(given.encode()).hexdigest()[:8]}", given
    if not name or not key:
        raise ConfigError(f"api_key: entry {number} is not of the form name:key")
    check_characters(given, f"api_key: entry {number}: name:key")
    if name == OTHER_TENANTS:
        raise ConfigError(
            f"api_key: entry {number}: {name} names the sum of small tenants in /metrics; use "
            "another name"
        )
    fields: dict[str, str] = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or field in fields:  # the text may be part of a key: it is not shown
            raise ConfigError(
                f"api_key: entry {number} ({name}): after the key, write field=value, each field "
                "once; a key has no spaces"
            )
        fields[field] = value
    return KeyEntry(name, key, fields)


def check_characters(text: str, where: str) -> None:
    """Refuse what a header cannot carry, or a log cannot show.

    Raises:
        ConfigError: the message begins with ``where`` and shows no part of the text.
    """
    if not text.isprintable():
        raise ConfigError(f"{where} has characters that cannot be printed; leave them out")
    if len(text) > _MAX_CHARS:
        raise ConfigError(f"{where} has {len(text)} characters; use at most {_MAX_CHARS}")
