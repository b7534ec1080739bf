"""Limits of a tenant that the engine applies: its share of steps, queue, chunk pool and pins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec


class TenantLimits(msgspec.Struct, kw_only=True, frozen=True):
    """Limits of one tenant; None is the rule that holds without a limit.

    Attributes:
        weight: its share of the service relative to other tenants; None is that of the settings.
        max_concurrent_requests: requests that run at once; others wait.
        max_queued_requests: requests that wait; one more is refused. None divides the places.
        queue_share: of ``max_waiting``, in (0, 1]; a limit beside ``max_queued_requests``.
        pin_chunks: chunks that its pins cover at most; None divides the budget.
        chunk_share: part of the pool, in (0, 1], beyond which its unused chunks are evicted before
            those of tenants within their share.
        chunk_floor: part of the pool, in [0, 1], up to which its chunks are evicted after those of
            all other tenants; None is half an equal share.
    """

    weight: float | None = None
    max_concurrent_requests: int | None = None
    max_queued_requests: int | None = None
    queue_share: float | None = None
    pin_chunks: int | None = None
    chunk_share: float | None = None
    chunk_floor: float | None = None


NO_LIMITS: Final = TenantLimits()


class TenantTable:
    """Limits by tenant name; tenants that are not listed have ``default``."""

    def __init__(
        self,
        tenants: Mapping[str, TenantLimits] | None = None,
        default: TenantLimits = NO_LIMITS,
    ) -> None:
        self._tenants = dict(tenants or {})
        self._default = default

    def __len__(self) -> int:
        """Return how many tenants are listed."""
        return len(self._tenants)

    def __getitem__(self, tenant: str) -> TenantLimits:
        """Return a tenant's limits; "" (a server with one tenant, public prefixes) has none."""
        return self._tenants.get(tenant, self._default) if tenant else NO_LIMITS


def parse_weights(value: str) -> dict[str, float]:
    """Weights by tenant from "alice=4,bob=0.5".

    Raises:
        ValueError: naming the entry.
    """
    weights: dict[str, float] = {}
    for entry in filter(None, map(str.strip, value.split(","))):
        tenant, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not tenant or not 0.001 <= number <= 1000:
            raise ValueError(f"write name=weight with a weight in [0.001, 1000], not {entry!r}")
        weights[tenant.strip()] = number
    return weights
