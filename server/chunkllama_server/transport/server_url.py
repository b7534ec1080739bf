"""Check the URL and the key with which a command reaches a server. Imports little."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from chunkllama.errors import ConfigError


def split_server_url(url: str) -> SplitResult:
    """Split the URL of a server; host and port of the result can be read.

    Raises:
        ConfigError: it is not an http or https URL, or its port is out of range.
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"url: {url}: {error}; write http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not has_host:
        raise ConfigError(f"url: {url} is not an http or https URL; write http://HOST:PORT")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"url: {url!r} has characters that a URL cannot have")
    return parts


def authorization(key: str) -> str:
    """Return the value of the header ``authorization`` for an API key.

    Raises:
        ConfigError: the key has characters that a header cannot have; the key is not shown.
    """
    if not key.isascii() or not key.isprintable():
        raise ConfigError("api_key: a key has printable ASCII characters alone")
    return f"Bearer {key}"
