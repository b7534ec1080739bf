"""Short steps for tenants that arrive while prompts of one tenant fill every step.

A request of a tenant with nothing running starts in the next step (``headroom.py``), which takes
long if another tenant's prompts and answers fill it. So, while one tenant has most of the prompt
tokens that wait or are being computed, a step that starts requests of tenants with nothing running
computes nothing of that tenant. At most every second step is such a short step, so that tenant
advances in half of the steps at least, and the bound between tenants (``queue.py``) holds in short
steps, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.tenants import Clocks

MOST: Final = 8  # prompt tokens of the one tenant, over those of the tenants that arrive


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a short step starts.

    Attributes:
        tenants: whose prompts it starts, while their clocks are at most ``most_clock``.
        held_back: the tenant of which it computes nothing.
    """

    tenants: frozenset[str]
    most_clock: float
    held_back: str

    def may_start(self, tenant: str, clocks: Clocks) -> bool:
        """Whether a request of the tenant may start now."""
        return tenant in self.tenants and clocks[tenant] <= self.most_clock


class FirstTokens:
    """Decides which steps are short.

    Args:
        clocks: returns the clocks of tenants with requests.
    """

    def __init__(
        self,
        lifecycle: SequenceLifecycle,
        limits: SchedulerLimits,
        clocks: Callable[[], Clocks],
    ) -> None:
        self._lifecycle = lifecycle
        self._clocks = clocks
        self._is_fair = limits.policy == "fair"
        self._quantum = limits.fair_quantum
        self._last_was_short = False

    def begin_step(self) -> Arrivals | None:
        """Return what this step may start, if it is a short one."""
        was_short, self._last_was_short = self._last_was_short, False
        accounts, waiting = self._lifecycle.accounts, self._lifecycle.waiting
        if was_short or not self._is_fair or not accounts.are_several:
            return None
        if not self._lifecycle.running.num_free_slots:
            return None
        prefills = self._lifecycle.running.prompts
        busy = {s.tenant for s in prefills}
        for sequence in self._lifecycle.running.by_age:
            if len(busy) > 1:  # with many tenants soon
                return None
            if sequence.tenant in waiting.ready:
                busy.add(sequence.tenant)
        arriving = [name for name in waiting.ready if not accounts.busy[name].num_running]
        if not arriving or len(busy) != 1:
            return None
        (tenant,) = busy
        tenants = frozenset(arriving)
        if not self._has_most(tenant, tenants, prefills):
            return None
        return Arrivals(tenants, self._clocks()[tenant] + self._quantum, tenant)

    def _has_most(self, tenant: str, arriving: frozenset[str], prefills: list[Sequence]) -> bool:
        """Whether the tenant has ``MOST`` times the prompt tokens of those that arrive."""
        waiting = self._lifecycle.waiting
        least = MOST * sum(map(waiting.num_tokens, arriving))
        return sum(s.num_remaining_tokens for s in prefills) + waiting.num_tokens(tenant) >= least

    def end_short_step(self) -> None:
        """Note that the step has started prompts of arriving tenants alone."""
        self._last_was_short = True
