"""Convert prompt-cache fields: how much of a prompt is stored, and how long it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkllama_server.api.schema.base import CacheFields
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.errors import invalid

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}
_DAY = 86_400.0
MAX_PIN_SECONDS = _DAY


@dataclass(frozen=True, slots=True)
class CachePlan:
    """``until``: prompt tokens that may be stored, None is all. ``pin_seconds``: least lifetime."""

    until: int | None = None
    pin_seconds: float = 0.0


NOTHING_STORED = CachePlan(0)


def pin_seconds(body: CacheFields, settings: Settings) -> float:
    """Return the requested cache lifetime; 0 leaves it to the eviction order.

    Raises:
        ApiError: 400 for a ttl beyond the server's limit, or an extension ttl in strict mode.
    """
    options = body.prompt_cache_options
    if options is not None and options.ttl is not None:
        if settings.strict and options.ttl != "30m":
            raise invalid('ttl must be "30m"', "prompt_cache_options.ttl")
        return ttl_seconds(options.ttl, "prompt_cache_options.ttl")
    if body.prompt_cache_retention == "24h":
        return _DAY
    return 0.0


def ttl_seconds(ttl: str, param: str) -> float:
    """Return the seconds of a checked ttl such as "30m".

    Raises:
        ApiError: 400 naming ``param``, beyond the server's limit.
    """
    seconds = float(int(ttl[:-1]) * _UNIT_SECONDS[ttl[-1]])
    if seconds > MAX_PIN_SECONDS:
        raise invalid(f"ttl is {seconds:.0f} s, the server allows {MAX_PIN_SECONDS:.0f} s", param)
    return seconds


def cache_plan(body: CacheFields, settings: Settings, breakpoints: Sequence[int] = ()) -> CachePlan:
    """Decide what to store of a prompt with explicit breakpoints after ``breakpoints`` tokens.

    A tree stores every prefix of what it stores, so of several breakpoints the last one decides.
    Without prefix caching nothing is stored.

    Raises:
        ApiError: see ``pin_seconds``.
    """
    options = body.prompt_cache_options
    lifetime = pin_seconds(body, settings)
    if not settings.enable_prefix_caching:
        return NOTHING_STORED
    if options is None or options.mode != "explicit":
        return CachePlan(None, lifetime)
    return CachePlan(max(breakpoints, default=0), lifetime)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the leading token ids that two prompts share."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
