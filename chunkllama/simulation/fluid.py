"""An ideal fair scheduler of a fluid: every tenant with work is served at once, at its share.

Generalized processor sharing (Parekh and Gallager, 1993): of a capacity of ``rate`` tokens a
second, each tenant with unfinished work receives its weight over the weights of all such tenants.
One tenant's requests are served in order of arrival. Nothing is rounded to steps or chunks, so the
times are a bound that no real scheduler can give to all tenants at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FluidRequest:
    """Work of one request in tokens: ``prefill`` up to the first token, ``decode`` after it."""

    at: float
    tenant: str
    prefill: float
    decode: float


def first_token_times(
    requests: Sequence[FluidRequest], rate: float, weights: Mapping[str, float] | None = None
) -> list[float]:
    """Return when each request's prefill work is done, in seconds.

    Args:
        requests: in order of arrival.
        rate: tokens a second, of all tenants together.
        weights: share of each tenant; 1 for those not listed.
    """
    weights = weights or {}
    # by tenant: (request, work left, whether its end is the first token)
    queues: dict[str, deque[tuple[int, bool]]] = {}
    left: dict[str, float] = {}
    times = [0.0] * len(requests)
    now, arrived = 0.0, 0
    while arrived < len(requests) or queues:
        arrival = requests[arrived].at if arrived < len(requests) else float("inf")
        total = sum(weights.get(tenant, 1.0) for tenant in queues)
        speed = {tenant: rate * weights.get(tenant, 1.0) / total for tenant in queues}
        end = min((now + left[tenant] / speed[tenant] for tenant in queues), default=float("inf"))
        later = min(arrival, end)
        for tenant in queues:
            left[tenant] -= (later - now) * speed[tenant]
        now = later
        for tenant in [t for t in queues if left[t] <= 1e-9 * rate]:
            _finish_head(tenant, queues, left, requests, times, now)
        while arrived < len(requests) and requests[arrived].at <= now:
            request = requests[arrived]
            queue = queues.get(request.tenant)
            if queue is None:
                queue = queues[request.tenant] = deque()
                left[request.tenant] = request.prefill
            queue += [(arrived, True), (arrived, False)]
            arrived += 1
    return times


def _finish_head(
    tenant: str,
    queues: dict[str, deque[tuple[int, bool]]],
    left: dict[str, float],
    requests: Sequence[FluidRequest],
    times: list[float],
    now: float,
) -> None:
    """End the piece of work that a tenant's queue begins with."""
    queue = queues[tenant]
    index, is_prefill = queue.popleft()
    if is_prefill:
        times[index] = now
    if not queue:
        del queues[tenant], left[tenant]
        return
    index, is_prefill = queue[0]
    left[tenant] = requests[index].prefill if is_prefill else requests[index].decode
