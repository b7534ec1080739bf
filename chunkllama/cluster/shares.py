"""Divides the limits of tenants over the replicas, so that they hold for all of them together.

A replica's share of a limit is what its requests use or wait for, equally with other replicas where
that is more than the limit, and an equal part of the rest. A share grows only by what no other
replica can be using: those whose shares shrink still run what they have begun. All of it follows
from the replicas' reports, which are the same for all front ends, and from what this front end has
sent since, so that a request finds its share where it goes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from chunkllama.messages import SetTenants, TenantStats
from chunkllama.tenant_limits import TenantLimits

DIVIDE_SECONDS: Final = 1.0  # between two divisions, unless a request lacks its share
_DIVIDED: Final = ("max_concurrent_requests", "max_queued_requests", "pin_chunks")


def divide(
    limit: int,
    used: Sequence[int],
    wanted: Sequence[int],
    given: Sequence[int],
    takes_rest: Sequence[bool],
) -> list[int]:
    """Divide a limit over replicas; the shares add up to at most the limit.

    Args:
        used, wanted: what each replica has of it, and would have beside that.
        given: its share until now.
        takes_rest: whether it gets a part of what none has or would have.
    """
    demands = [has + would for has, would in zip(used, wanted, strict=True)]
    targets = _fill(demands, limit)
    rest = limit - sum(targets)
    others = [index for index, takes in enumerate(takes_rest) if takes]
    for number, index in enumerate(others):
        targets[index] += rest // len(others) + (number < rest % len(others))
    held = [
        max(has, min(share, demand))
        for has, share, demand in zip(used, given, demands, strict=True)
    ]
    missing = [max(target - has, 0) for target, has in zip(targets, held, strict=True)]
    more = _fill(missing, max(limit - sum(held), 0))
    return [
        min(target, has + added) for target, has, added in zip(targets, held, more, strict=True)
    ]


def _fill(needs: Sequence[int], limit: int) -> list[int]:
    """Return the parts of a limit that meet the needs, equal ones where it is too small."""
    parts, missing = [0] * len(needs), list(needs)
    while limit and (lacking := [index for index, need in enumerate(missing) if need]):
        most = max(limit // len(lacking), 1)
        for index in lacking:
            part = min(most, missing[index], limit)
            parts[index] += part
            missing[index] -= part
            limit -= part
    return parts


class _Replica:
    """What is known of a replica.

    Attributes:
        tenants: of its last report.
        requests, chunks: sent to it since, by tenant: requests, and chunks that they are to pin.
        limits: that it was last given.
        shrunk: what it may be using of limits whose share has become smaller since its report.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.tenants: Mapping[str, TenantStats] = {}
        self.requests: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.limits: SetTenants | None = None
        self.shrunk: dict[tuple[str, str], int] = {}

    def report(self, tenants: Mapping[str, TenantStats]) -> None:
        """Take a report; what was sent since the last one is in it."""
        self.tenants = tenants
        self.requests.clear()
        self.chunks.clear()
        self.shrunk.clear()

    def needs(self, tenant: str, field: str) -> tuple[int, int]:
        """What a tenant has of a limit, and would have beside that."""
        stats, sent = self.tenants.get(tenant, _NONE), self.requests[tenant]
        match field:
            case "max_concurrent_requests":
                has, would = stats.requests_running, stats.requests_waiting + sent
            case "max_queued_requests":
                has, would = stats.requests_waiting, sent
            case _:
                has, would = stats.chunks_pinned, self.chunks[tenant]
        has = max(has, self.shrunk.get((tenant, field), 0))
        return has, would

    def share(self, tenant: str, field: str) -> int:
        """Its share of a limit until now."""
        limits = None if self.limits is None else self.limits.tenants.get(tenant)
        return 0 if limits is None else getattr(limits, field) or 0


_NONE: Final = TenantStats()


class LimitShares:
    """Limits of tenants, and each replica's shares of them.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_at = -math.inf
        self._limits = SetTenants()
        self._replicas: dict[str, _Replica] = {}
        self._idle: dict[str, dict[str, TenantLimits]] = {}  # of tenants that use nothing

    def set_limits(self, limits: SetTenants) -> None:
        """Replace the limits, which are those of all replicas together."""
        self._limits = limits
        self._idle.clear()

    def add(self, replica: str) -> None:
        """Give a replica shares."""
        self._replicas[replica] = _Replica()
        self._idle.clear()

    def drain(self, replica: str) -> None:
        """Leave a replica no more than it uses."""
        self._replicas[replica].is_draining = True
        self._idle.clear()

    def remove(self, replica: str) -> None:
        """Forget a replica, which has ended."""
        del self._replicas[replica]
        self._idle.clear()

    def report(self, replica: str, tenants: Mapping[str, TenantStats]) -> bool:
        """Take what a replica says of each tenant, if it was asked; returns once in
        ``DIVIDE_SECONDS`` that the shares are to be divided again."""
        if tenants:
            self._replicas[replica].report(tenants)
        now = self._clock()
        is_due = now >= self._due_at
        if is_due:
            self._due_at = now + DIVIDE_SECONDS
        return is_due

    def is_short(self, replica: str, tenant: str, pin_chunks: int) -> bool:
        """Note a request that is sent to a replica; returns whether it needs a larger share and
        could have it.

        Args:
            pin_chunks: that it is to pin.
        """
        limits, known = self._limits.tenants.get(tenant), self._replicas[replica]
        if limits is None or known.limits is None or not is_divided(limits):
            return False
        known.requests[tenant] += 1
        known.chunks[tenant] += pin_chunks
        short = [
            field
            for field in ("max_concurrent_requests", "pin_chunks")
            if getattr(limits, field) is not None
            and sum(known.needs(tenant, field)) > known.share(tenant, field)
        ]
        if not short:
            return False
        better = self._divide(tenant, limits)[replica]
        return any(getattr(better, field) > known.share(tenant, field) for field in short)

    def changes_of(self, tenant: str) -> dict[str, SetTenants]:
        """As ``changes`` after ``is_short``, where only this tenant's limits are divided again."""
        shares, changed = self._divide(tenant, self._limits.tenants[tenant]), {}
        for name, known in self._replicas.items():
            if known.limits is None or known.limits.tenants.get(tenant) == shares[name]:
                continue
            self._note_smaller(known, {tenant: shares[name]})
            table = {**known.limits.tenants, tenant: shares[name]}
            changed[name] = known.limits = SetTenants(tenants=table, default=known.limits.default)
        return changed

    def changes(self) -> dict[str, SetTenants]:
        """The limits of each replica that has not been given these."""
        tables: dict[str, dict[str, TenantLimits]] = {name: {} for name in self._replicas}
        for tenant, limits in self._limits.tenants.items():
            shares = self._divide(tenant, limits) if is_divided(limits) else {}
            for name, table in tables.items():
                table[tenant] = shares.get(name, limits)
        changed = {}
        for name, table in tables.items():
            known = self._replicas[name]
            message = SetTenants(tenants=table, default=self._limits.default)
            if message != known.limits:
                self._note_smaller(known, message.tenants)
                changed[name] = known.limits = message
        return changed

    def _note_smaller(self, known: _Replica, given: Mapping[str, TenantLimits]) -> None:
        for tenant, limits in given.items():
            for field in _DIVIDED:
                share = getattr(limits, field)
                before = known.share(tenant, field)
                if share is not None and share < before:
                    has, would = known.needs(tenant, field)
                    known.shrunk[tenant, field] = max(has, min(before, has + would))

    def _divide(self, tenant: str, limits: TenantLimits) -> dict[str, TenantLimits]:
        """A tenant's limits on each replica."""
        names = sorted(self._replicas)  # all front ends have the same order
        replicas = [self._replicas[name] for name in names]
        needs = {
            field: [each.needs(tenant, field) for each in replicas]
            for field in _DIVIDED
            if getattr(limits, field) is not None
        }
        is_idle = not any(has or would for each in needs.values() for has, would in each)
        if is_idle and tenant in self._idle:
            return self._idle[tenant]
        takes_rest = [not each.is_draining for each in replicas]
        fields: list[dict[str, int]] = [{} for _ in names]
        for field, of_replicas in needs.items():
            used, wanted = zip(*of_replicas, strict=True)
            given = [each.share(tenant, field) for each in replicas]
            shares = divide(getattr(limits, field), used, wanted, given, takes_rest)
            for share, own in zip(shares, fields, strict=True):
                own[field] = share
        found = {
            name: msgspec.structs.replace(limits, **own)
            for name, own in zip(names, fields, strict=True)
        }
        if is_idle:
            self._idle[tenant] = found
        return found


def is_divided(limits: TenantLimits) -> bool:
    """Whether a tenant has limits that are divided over replicas."""
    return any(getattr(limits, field) is not None for field in _DIVIDED)
