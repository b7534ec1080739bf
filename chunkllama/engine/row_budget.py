"""Share the time between two passes of the model among requests: grammar masks and sampling.

Rows of the model cost alike, but what follows it does not: a mask takes 0.05 ms or 50 ms, and a
request of 128 choices samples 128 rows. Every other request of the step waits for that. So each
request has a credit in seconds, which is refilled with a share of the model's time in each step and
pays for its rows. Rows that it does not cover are sampled in a later step; of a request whose rows
have an unknown cost the first step samples one. A row's token depends on that row alone, so tokens
do not depend on the step they are sampled in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

# All requests in debt together get this part of the model's time, however many they are.
_SHARE_OF_INDEBTED: Final = 0.5
_SMOOTHING: Final = 0.5


class RowBudget:
    """Credits of the requests that take part in the steps.

    Args:
        share: of the model's time that one request may use for its rows while other requests run.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credits: dict[str, float] = {}
        self._row_seconds: dict[str, float] = {}

    @property
    def share(self) -> float:
        return self._share

    def choose(
        self, rows: Sequence[tuple[int, str]], present: Collection[str], *, must_choose: bool
    ) -> set[int]:
        """Choose the slots to sample in this step.

        Args:
            rows: (slot, request id), those that have waited longest first.
            present: ids of all requests of the step; a request alone has no limit.
            must_choose: choose at least one, because nothing else happens in the step.
        """
        if len(present) <= 1:
            return {slot for slot, _ in rows}
        slots: dict[str, list[int]] = {}
        for slot, request_id in rows:
            slots.setdefault(request_id, []).append(slot)
        chosen: set[int] = set()
        for request_id, own in slots.items():
            chosen.update(own[: self._num_rows(request_id)])
        if not chosen and must_choose and slots:
            self._forgive(slots)
            best = max(slots, key=lambda request_id: self._credits[request_id])
            chosen.add(slots[best][0])
        return chosen

    def _num_rows(self, request_id: str) -> int:
        """Rows that the credit covers; at least one unless it is used up."""
        credit = self._credits.get(request_id, 0.0)
        cost = self._row_seconds.get(request_id)
        if credit < 0.0:
            return 0
        if cost is None:
            return 1
        return max(1, int(credit / cost)) if cost > 0.0 else 1 << 30

    def _forgive(self, request_ids: Collection[str]) -> None:
        """Raise the credits of requests that are all in debt, so that the least of them is paid."""
        missing = -max(self._credits[request_id] for request_id in request_ids)
        for request_id in request_ids:
            self._credits[request_id] += missing

    def charge(self, request_id: str, seconds: float) -> None:
        """Take time from a request's credit."""
        self._credits[request_id] = self._credits.get(request_id, 0.0) - seconds

    def charge_rows(self, request_id: str, seconds: float, num_rows: int) -> None:
        """Take what ``num_rows`` rows of a request have cost from its credit."""
        self.charge(request_id, seconds)
        cost = seconds / num_rows
        known = self._row_seconds.get(request_id, cost)
        self._row_seconds[request_id] = known + _SMOOTHING * (cost - known)

    def refill(self, model_seconds: float, present: Collection[str]) -> None:
        """Add the share of a step whose model pass took ``model_seconds``; forget who has left."""
        whole = self._share * model_seconds
        indebted = [r for r in present if self._credits.get(r, 0.0) < 0.0]
        part = min(whole, _SHARE_OF_INDEBTED * model_seconds / max(len(indebted), 1))
        credits: dict[str, float] = {}
        for request_id in present:
            credit = self._credits.get(request_id, 0.0)
            credit = credit + part if credit < 0.0 else whole
            credits[request_id] = whole if len(present) == 1 else min(credit, whole)
        self._credits = credits
        self._row_seconds = {r: s for r, s in self._row_seconds.items() if r in credits}
