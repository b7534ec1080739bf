"""Short steps for tenants that arrive while prompts of one tenant fill every step.

A request of a tenant with nothing running starts in the next step (``headroom.py``), which takes
long if another tenant's prompts and answers fill it. So, while one tenant has most of the prompt
tokens that wait or are being computed, a step that starts requests of tenants with nothing running
computes nothing of that tenant. At most every second step is such a short step, so that tenant
advances in half of the steps at least, and the bound between tenants (``queue.py``) holds in short
steps, too.

A request also waits for the rest of the step in progress. So, for ``LATELY`` seconds after a short
step, a step of one tenant of which ``MANY`` requests wait takes at most ``MOST_WAIT`` times as long
as the short one. At the median the next request waits for half of that, as long as its own step
takes, so its first token takes twice as long as without the other tenant. As many more steps read
the weights, so that tenant computes less meanwhile: half of its steps' time is left to its tokens
where a short step does little else. A few clients with long prompts are no flood and lose nothing:
an arrival beside them waits for a step of the usual time. ``max_tenant_slowdown`` of 0 turns this
off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.pace import Pace
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.tenants import Clocks

MOST: Final = 8  # prompt tokens of the one tenant, over those of the tenants that arrive
LATELY: Final = 10.0  # seconds after a short step in which another arrival is likely
MANY: Final = 8  # waiting requests of a tenant that make a flood
MOST_WAIT: Final = 2.0  # short steps that the step which the next arrival waits for may take


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
    """Decides which steps are short, and how long those between them may take.

    Args:
        clocks: returns the clocks of tenants with requests.
        pace: measures steps, and limits what a tenant may have of one; its step has begun.
    """

    def __init__(
        self,
        lifecycle: SequenceLifecycle,
        limits: SchedulerLimits,
        clocks: Callable[[], Clocks],
        pace: Pace,
    ) -> None:
        self._lifecycle = lifecycle
        self._clocks = clocks
        self._pace = pace
        self._is_fair = limits.policy == "fair"
        self._quantum = limits.fair_quantum
        self._last_was_short = False
        self._until = 0.0
        self._short_seconds = 0.0

    def begin_step(self) -> Arrivals | None:
        """Return what this step may start, if it is a short one."""
        was_short, self._last_was_short = self._last_was_short, False
        if was_short:
            self._short_seconds = self._pace.last_seconds
        if self._until:
            self._limit_next_wait()
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

    def _limit_next_wait(self) -> None:
        """Bound the step that the next arrival waits for, if one tenant fills it."""
        busy = self._lifecycle.accounts.busy
        if self._pace.started >= self._until:
            self._until = 0.0
        elif len(busy) == 1:
            (tenant,) = busy
            if self._lifecycle.waiting.num_ready(tenant) >= MANY:
                self._pace.limit_alone(tenant, MOST_WAIT * self._short_seconds)

    def _has_most(self, tenant: str, arriving: frozenset[str], prefills: list[Sequence]) -> bool:
        """Whether the tenant has ``MOST`` times the prompt tokens of those that arrive."""
        waiting = self._lifecycle.waiting
        least = MOST * sum(map(waiting.num_tokens, arriving))
        return sum(s.num_remaining_tokens for s in prefills) + waiting.num_tokens(tenant) >= least

    def end_short_step(self) -> None:
        """Note that the step has started prompts of arriving tenants alone."""
        self._last_was_short = True
        self._until = self._pace.started + LATELY
