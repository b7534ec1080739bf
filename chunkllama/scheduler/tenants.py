"""Service that each tenant has received, in virtual tokens, and its unfinished requests.

A virtual token is a prompt token computed or, times ``DECODE_WEIGHT``, a token decoded (the virtual
token counters of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Charges are
whole tokens: a chunk that several running sequences read is divided among them, and the remainder
is charged to the sequence that computed it, so the charges of a step add up to its work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.tenant_limits import TenantLimits, TenantTable

DECODE_WEIGHT: Final = 2  # a decoded token costs about twice a prompt token of a full step


class Account:
    """One tenant.

    Attributes:
        weight: its share relative to other tenants.
        limits: what it may use.
        computed_tokens, decoded_tokens: positions charged since the start, of prompts and output.
        clock: what was charged in virtual tokens, also of work between steps, divided by the weight
            at that time, advanced past the time the tenant was idle.
        num_requests: its unfinished requests; ``num_running`` those with a running sequence.
    """

    __slots__ = (
        "clock",
        "computed_tokens",
        "decoded_tokens",
        "limits",
        "num_requests",
        "num_running",
        "weight",
    )

    def __init__(self, weight: float, limits: TenantLimits) -> None:
        self.weight = weight
        self.limits = limits
        self.computed_tokens = 0
        self.decoded_tokens = 0
        self.clock = 0.0
        self.num_requests = 0
        self.num_running = 0

    @property
    def charged(self) -> int:
        """Virtual tokens charged since the start."""
        return self.computed_tokens + DECODE_WEIGHT * self.decoded_tokens

    @property
    def num_waiting(self) -> int:
        """Its requests without a running sequence."""
        return self.num_requests - self.num_running

    def may_run(self, group: SequenceGroup) -> bool:
        """Whether a sequence of the group may start beside the tenant's running requests."""
        most = self.limits.max_concurrent_requests
        return most is None or self.num_running < most or group.is_running


class Clocks:
    """Clocks of the tenants with unfinished requests while a step is put together.

    A clock counts the tokens, too, that the tenant's running sequences have left to compute: what
    they share with other tenants is not charged to it in the end, so the clock may be lower in the
    next step.

    Args:
        busy: accounts of those tenants.
        running: running sequences.
    """

    def __init__(self, busy: Mapping[str, Account], running: Iterable[Sequence]) -> None:
        self._busy = busy
        self._promised: dict[str, float] = {}
        promised = self._promised
        for sequence in running:
            if count := sequence.num_tokens - sequence.num_computed_tokens:
                tenant = sequence.tenant
                promised[tenant] = promised.get(tenant, 0.0) + count / busy[tenant].weight

    def __getitem__(self, tenant: str) -> float:
        account = self._busy.get(tenant)
        return 0.0 if account is None else account.clock + self._promised.get(tenant, 0.0)

    def add(self, tenant: str, tokens: int) -> None:
        """Count tokens that a sequence of the tenant has left to compute."""
        promised = tokens / self._busy[tenant].weight
        self._promised[tenant] = self._promised.get(tenant, 0.0) + promised

    def least(self, tenant: str) -> float:
        """Return what the tenant's clock is without those tokens; it never becomes lower."""
        account = self._busy.get(tenant)
        return 0.0 if account is None else account.clock


class TenantAccounts:
    """Accounts by tenant name; the tenant with the lowest clock is served next.

    Accounts are kept: tenants are the names of API keys, so there are few.

    Attributes:
        busy: accounts of the tenants with unfinished requests.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._limits = TenantTable()
        self._accounts: dict[str, Account] = {}
        self._floor = 0.0
        self.busy: dict[str, Account] = {}
        self.total_charged = 0

    def __getitem__(self, tenant: str) -> Account:
        return self._accounts[tenant]

    def __iter__(self) -> Iterator[tuple[str, Account]]:
        return iter(self._accounts.items())

    @property
    def are_several(self) -> bool:
        """At least two tenants have limits or have sent requests."""
        return len(self._limits) > 1 or len(self._accounts) - ("" in self._accounts) > 1

    def set_limits(self, limits: TenantTable) -> None:
        """Apply other limits and weights, from the next charge and the next start on."""
        self._limits = limits
        for tenant, account in self._accounts.items():
            account.limits = limits[tenant]
            account.weight = self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        own = self._limits[tenant].weight
        return self._weights.get(tenant, 1.0) if own is None else own

    def get(self, tenant: str) -> Account:
        """Return a tenant's account; one without requests if it has none."""
        account = self._accounts.get(tenant)
        return account or Account(self._weight(tenant), self._limits[tenant])

    def join(self, tenant: str) -> None:
        """Count one more unfinished request."""
        self.busy[tenant] = account = self._level(tenant)
        account.num_requests += 1

    def _level(self, tenant: str) -> Account:
        """Return a tenant's account, made if it has none.

        One that is idle is level with the tenant served least: time without requests earns no
        credit, and debt is kept.
        """
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = self.get(tenant)
        if account.num_requests == 0:
            busy = [other.clock for other in self.busy.values()]
            account.clock = max(account.clock, min(busy, default=self._floor))
        return account

    def leave(self, tenant: str) -> None:
        """Count one unfinished request fewer."""
        account = self._accounts[tenant]
        account.num_requests -= 1
        if account.num_requests == 0:
            self._floor = max(self._floor, account.clock)
            del self.busy[tenant]

    def charge_computed(self, tenant: str, tokens: int) -> None:
        """Charge prompt tokens that were computed."""
        account = self._accounts[tenant]
        account.computed_tokens += tokens
        account.clock += tokens / account.weight
        self.total_charged += tokens

    def charge_decoded(self, tenant: str, tokens: int) -> None:
        """Charge output tokens that were computed."""
        account, virtual_tokens = self._accounts[tenant], DECODE_WEIGHT * tokens
        account.decoded_tokens += tokens
        account.clock += virtual_tokens / account.weight
        self.total_charged += virtual_tokens

    def charge_other_work(self, tenant: str, tokens: float) -> None:
        """Charge what was done for a tenant between steps, by the tokens that take as long to
        compute: chunks that were read, or a match that was explained.

        It is no work of a step, so only the clock has it.
        """
        account = self._level(tenant)
        account.clock += tokens / account.weight


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
    own = sequences[at].tenant
    first = start // chunk_size
    readers: list[tuple[int, str]] = []  # (leading chunks read too, tenant)
    for step in (-1, 1):
        common, i = 1 << 30, at
        while 0 <= i + step < len(sequences):
            common = min(common, shared[i if step < 0 else i + 1])
            if common <= first:
                break
            i += step
            readers.append((common, sequences[i].tenant))
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
