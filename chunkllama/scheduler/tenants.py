"""Service that each tenant has received, in virtual tokens, and its places in the queue.

A virtual token is a prompt token computed or, times ``DECODE_WEIGHT``, a token decoded (the virtual
token counters of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Charges are
whole tokens: a chunk that several running sequences read is divided among them, and the remainder
is charged to the sequence that computed it, so the charges of a step add up to its work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from chunkllama.scheduler.request import Sequence

DECODE_WEIGHT: Final = 2  # a decoded token costs about twice a prompt token of a full step
MAX_IDLE_ACCOUNTS: Final = 4096


class Account:
    """One tenant.

    Attributes:
        weight: its share relative to other tenants.
        charged: virtual tokens charged since the start.
        clock: ``charged / weight``, advanced past the time the tenant was idle.
        num_requests: its unfinished requests.
    """

    __slots__ = ("charged", "clock", "num_requests", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.charged = 0
        self.clock = 0.0
        self.num_requests = 0


class TenantAccounts:
    """Accounts by tenant name; the tenant with the lowest clock is served next."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._accounts: dict[str, Account] = {}
        self._floor = 0.0
        self.total_charged = 0

    def __getitem__(self, tenant: str) -> Account:
        return self._accounts[tenant]

    def clocks(self) -> dict[str, float]:
        """Clock of every tenant with unfinished requests."""
        return {name: a.clock for name, a in self._accounts.items() if a.num_requests}

    def num_requests(self, tenant: str) -> int:
        """Unfinished requests of a tenant, known or not."""
        account = self._accounts.get(tenant)
        return account.num_requests if account else 0

    def join(self, tenant: str) -> None:
        """Count one more unfinished request.

        A tenant that was idle starts level with the tenant served least: time without requests
        earns no credit, and debt is kept.
        """
        account = self._accounts.get(tenant)
        if account is None:
            self._drop_idle()
            account = self._accounts[tenant] = Account(self._weights.get(tenant, 1.0))
        if account.num_requests == 0:
            busy = [a.clock for a in self._accounts.values() if a.num_requests]
            account.clock = max(account.clock, min(busy, default=self._floor))
        account.num_requests += 1

    def leave(self, tenant: str) -> None:
        """Count one unfinished request fewer."""
        account = self._accounts[tenant]
        account.num_requests -= 1
        if account.num_requests == 0:
            self._floor = max(self._floor, account.clock)

    def charge(self, tenant: str, virtual_tokens: int) -> None:
        account = self._accounts[tenant]
        account.charged += virtual_tokens
        self.total_charged += virtual_tokens
        account.clock += virtual_tokens / account.weight

    def _drop_idle(self) -> None:
        """Bound the memory of tenants without requests: those served least are forgotten first."""
        if len(self._accounts) < MAX_IDLE_ACCOUNTS:
            return
        idle = [name for name, a in self._accounts.items() if a.num_requests == 0]
        idle.sort(key=lambda name: self._accounts[name].clock)
        for name in idle[: len(idle) // 2 + 1]:
            del self._accounts[name]


def split_prefill(
    sequences: list[Sequence], shared: list[int], at: int, start: int, end: int, chunk_size: int
) -> list[tuple[str, int]]:
    """Divide the cost of positions [start, end) among the running sequences that read them.

    Args:
        sequences, shared: the tree order and its common prefixes in chunks (``TreeOrder``).
        at: index of the sequence that computed the positions.

    Returns:
        (tenant, tokens) pairs; the tokens add up to ``end - start``.
    """
    own = sequences[at].group.request.tenant
    first = start // chunk_size
    readers: list[tuple[int, str]] = []  # (leading chunks read too, tenant)
    for step in (-1, 1):
        common, i = 1 << 30, at
        while 0 <= i + step < len(sequences):
            common = min(common, shared[i if step < 0 else i + 1])
            if common <= first:
                break
            i += step
            readers.append((common, sequences[i].group.request.tenant))
    if all(tenant == own for _, tenant in readers):
        return [(own, end - start)]
    charges: list[tuple[str, int]] = []
    for depth in range(first, (end - 1) // chunk_size + 1):
        tokens = min(end, (depth + 1) * chunk_size) - max(start, depth * chunk_size)
        others = [tenant for common, tenant in readers if common > depth]
        each = tokens // (len(others) + 1)
        charges += [(tenant, each) for tenant in others]
        charges.append((own, tokens - each * len(others)))
    return charges
