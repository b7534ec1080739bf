"""Requests and tokens per minute of one tenant, with OpenAI's headers.

Both are token buckets: full at first, refilled at a sixtieth of the limit per second. A request is
charged one request, and its prompt and ``max_tokens`` before it runs; when it ends, what it did not
use is given back. Output beyond the estimate (a request without ``max_tokens``) is charged as it
comes, and may leave less than nothing, which delays the next request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from chunkllama_server.config.tenants import NO_QUOTAS, TenantQuotas
from chunkllama_server.transport.errors import ApiError

MINUTE = 60.0


class TokenBucket:
    """Holds at most ``limit`` and gains ``limit`` per minute.

    Args:
        limit: per minute.
        clock: monotonic seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._spent = 0.0
        self._updated = clock()

    def _refill(self) -> float:
        now = self._clock()
        self._level = min(self._level + (now - self._updated) * self.limit / MINUTE, self.limit)
        self._updated = now
        return self._level

    @property
    def remaining(self) -> int:
        """What is left, at least 0."""
        return max(int(self._refill() + 1e-6), 0)

    def take(self, amount: float) -> None:
        """Remove ``amount``, even if less is left; negative gives back."""
        self.take_elsewhere(amount)
        self._spent += amount

    def take_elsewhere(self, amount: float) -> None:
        """Remove what another server has taken from its bucket of the same tenant."""
        self._level = min(self._refill() - amount, self.limit)

    def take_spent(self) -> float:
        """What ``take`` has removed since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def seconds_until(self, amount: float) -> float:
        """Seconds until ``amount``, at most the limit, is left; 0 if it is."""
        missing = amount - self._refill()
        return missing * MINUTE / self.limit if missing > 1e-6 else 0.0

    def seconds_until_full(self) -> float:
        return self.seconds_until(self.limit)

    def set_limit(self, limit: int) -> None:
        """Change the limit; the same part of it is left as before."""
        self._level = self._refill() * limit / self.limit
        self.limit = limit


class TokenCharge:
    """Tokens that one HTTP request was charged for, and has used."""

    def __init__(self, bucket: TokenBucket | None = None, estimate: int = 0) -> None:
        self._bucket = bucket
        self._charged = estimate
        self._used = 0

    def use(self, tokens: int) -> None:
        """Count tokens that were processed; those beyond the estimate are charged now."""
        self._used += tokens
        if self._used > self._charged:
            self._take(self._used - self._charged)

    def settle(self) -> None:
        """Give back what was charged and not used; again has no effect."""
        self._take(self._used - self._charged)

    def _take(self, tokens: int) -> None:
        self._charged += tokens
        if self._bucket is not None and tokens:
            self._bucket.take(tokens)


class RateLimiter:
    """Limits of one tenant.

    Args:
        clock: monotonic seconds.

    Attributes:
        requests, tokens: None without a limit.
    """

    def __init__(
        self, quotas: TenantQuotas = NO_QUOTAS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.set_quotas(quotas)

    def set_quotas(self, quotas: TenantQuotas) -> None:
        """Apply other limits from now on."""
        self.requests = self._changed(self.requests, quotas.requests_per_minute)
        self.tokens = self._changed(self.tokens, quotas.tokens_per_minute)

    def _changed(self, bucket: TokenBucket | None, limit: int | None) -> TokenBucket | None:
        if limit is None:
            return None
        if bucket is None:
            return TokenBucket(limit, self._clock)
        bucket.set_limit(limit)
        return bucket

    def take_request(self) -> None:
        """Charge a request.

        Raises:
            ApiError: 429 with Retry-After.
        """
        if self.requests is not None:
            seconds = self.requests.seconds_until(1)
            if seconds:
                raise _refusal("requests", self.requests, 1, seconds)
            self.requests.take(1)

    def take_tokens(self, estimate: int) -> TokenCharge:
        """Charge a request's tokens.

        Args:
            estimate: prompt tokens, and the most output tokens where the request limits them.

        Raises:
            ApiError: 429, with Retry-After unless it could never pass.
        """
        if self.tokens is not None:
            if estimate > self.tokens.limit:
                raise _too_large(self.tokens.limit, estimate)
            seconds = self.tokens.seconds_until(estimate)
            if seconds:
                raise _refusal("tokens", self.tokens, estimate, seconds)
            self.tokens.take(estimate)
        return TokenCharge(self.tokens, estimate)

    def take_spent(self) -> tuple[float, float]:
        """Requests and tokens that were charged here since the last call."""
        requests = 0.0 if self.requests is None else self.requests.take_spent()
        return requests, 0.0 if self.tokens is None else self.tokens.take_spent()

    def charge_elsewhere(self, requests: float, tokens: float) -> None:
        """Charge what another server has charged."""
        if self.requests is not None:
            self.requests.take_elsewhere(requests)
        if self.tokens is not None:
            self.tokens.take_elsewhere(tokens)

    def headers(self) -> dict[str, str]:
        """Return the x-ratelimit headers of this moment; none without limits."""
        headers: dict[str, str] = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(bucket.remaining)
                headers[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_until_full())
        return headers


def duration(seconds: float) -> str:
    """Format as OpenAI does: "6m0s", "1.25s", "120ms"."""
    milliseconds = math.ceil(seconds * 1000 - 1e-3)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{text}" if minutes else text


def _refusal(kind: str, bucket: TokenBucket, requested: int, seconds: float) -> ApiError:
    what = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}[kind]
    error = ApiError(
        429,
        f"Rate limit reached on {what}: Limit {bucket.limit}, Used "
        f"{bucket.limit - bucket.remaining}, Requested {requested}. Please try again in "
        f"{duration(seconds)}.",
        code="rate_limit_exceeded",
        kind=kind,
    )
    error.headers = {
        "Retry-After": str(max(math.ceil(seconds), 1)),
        "retry-after-ms": str(max(math.ceil(seconds * 1000), 1)),
    }
    return error


def _too_large(limit: int, requested: int) -> ApiError:
    error = ApiError(
        429,
        f"Request too large on tokens per min (TPM): Limit {limit}, Requested {requested}. The "
        "input or output tokens must be reduced in order to run successfully.",
        code="rate_limit_exceeded",
        kind="tokens",
    )
    error.headers = {"x-should-retry": "false"}
    return error
