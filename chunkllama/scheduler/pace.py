"""How much the work of one tenant may lengthen the steps of others.

A step takes as long as all of its rows and prompt tokens together, so 63 choices or a long prompt
of one tenant slow everybody's next token. A tenant's *share* of a step is the lower median of what
the tenants with running work want to compute in it, by weight, the one that wants most left out.
Sequences in the background do not count. A tenant that wants more than ``LIKE`` shares, those
included, is *heavy* and pays with a credit in seconds for its tokens, or for those in the
background alone if the others are at most ``LIKE`` shares:

    each step adds         (slowdown - 1) * (seconds of a step without it),
                           or the price of its share if that is more
    a step with it takes   (seconds of that step) - (seconds of a step without it)

so the steps of the others take at most ``slowdown`` times as long on average, for tokens of any
cost: times are measured, and the price of a token only decides how many tokens the credit pays for.
A heavy tenant computes when its credit pays for ``LEAST`` tokens, or for all that it wants, or is
full after ``PATIENCE`` steps. It thus takes several tokens at once, which read the weights, a
shared prefix and the context of a prompt together, while the longest steps of the others remain a
few times as long as usual. The steps between them show how long a step without it takes. A debt is
cut at ``MOST_DEBT`` steps, so a heavy tenant computes a token in at least one of ``PATIENCE +
MOST_DEBT + 1`` steps.

Tenants with like loads are not heavy, and on a server with one tenant no tenant is. Where tokens
cost little, as on a GPU, the credit pays for all of them.

A first token waits for the step in progress, and so does the next token of each stream. So the
prompts of every step are cut where it would take longer than ``max_step_seconds`` (where several
tenants have work, than ``SEVERAL_SHARE`` of it), and than ``WEIGHTS_SHARE`` steps of one token,
which mostly read the weights. Prompts in the background have ``BACKGROUND_SHARE`` of that time: the
next first token waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Final

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.step_cost import WEIGHT
from chunkllama.scheduler.step_times import GUESS, LARGEST, StepTimes

NO_LIMIT: Final = 2**31 - 1
LIKE: Final = 2  # shares that a tenant may compute without paying
LEAST: Final = 16  # tokens that are worth a step of the others
SHORT_SHARE: Final = 4  # a step reserves 1 / SHORT_SHARE of its tokens for short and new prompts
SHORT: Final = 32  # tokens that it reserves in any case, unless that is more than of a full step
PATIENCE: Final = 4  # steps whose credit a tenant may save
MOST_DEBT: Final = 12  # steps after which a debt is paid, however large it was
WEIGHTS_SHARE: Final = 8  # steps of one token that a step with prompts may take in any case
SEVERAL_SHARE: Final = 2 / 3  # of ``max_step_seconds``, where several tenants have work
BACKGROUND_SHARE: Final = 0.5  # of those times, where all prompts are in the background
_SPENT: Final = 0.8  # of the slowdown allowed; the rest is for what steps do not measure
_NEW_STARTS: Final = 4  # a heavy tenant leaves 1 / _NEW_STARTS of its tokens to waiting requests
_FREE: Final = 1e-4  # the least part of a step that a token counts for


class _Credit:
    """What a heavy tenant may spend.

    Attributes:
        seconds: saved, or owed if negative.
        at: paced step up to which they count.
        refill: that a step adds.
        price: seconds of one of its tokens, measured; None is unknown.
        last: slot whose turn it was last.
    """

    __slots__ = ("at", "last", "price", "refill", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.at = -PATIENCE  # full
        self.refill = 0.0
        self.price: float | None = None
        self.last = -1


class Pace:
    """Decides how many tokens each tenant may have in a step.

    Args:
        clock: monotonic seconds.

    Attributes:
        started, last_seconds: of this step, and of the last one that ran the model.
    """

    def __init__(
        self, lifecycle: SequenceLifecycle, limits: SchedulerLimits, clock: Callable[[], float]
    ) -> None:
        self._lifecycle = lifecycle
        self._budget = self._largest = limits.max_num_batched_tokens
        self._step_seconds = limits.max_step_seconds
        self._slowdown = 1.0 + _SPENT * (limits.max_tenant_slowdown - 1.0)
        self._is_on = limits.policy == "fair" and limits.max_tenant_slowdown > 0
        self._clock = clock
        self._times = StepTimes()  # of steps in which no tenant is heavy
        self._all_times = StepTimes()
        self._credits: dict[str, _Credit] = {}
        self._num_paced = 0
        self.started = self.last_seconds = 0.0
        self._level = 0.0  # tokens of a share for a weight of 1; 0: the step is not paced
        self._light_seconds = 0.0
        self._usual_price: float | None = None  # the last one measured
        self._wanted: dict[str, int] = {}
        self._free: Container[str] = ()  # tenants with a limit for background sequences alone
        self._left: dict[str, int] = {}  # tokens of new sequences, by tenant with a limit
        self._parts: dict[Sequence, int] = {}  # tokens of running sequences of those tenants
        self._tokens: dict[str, int] = {}  # by tenant, in the step in flight
        self._num_free_tokens = 0  # in it, of sequences without a limit of tenants with one

    def prompt_seconds(self, tokens: int) -> float | None:
        """Estimate the time of computing prompt tokens in full steps; None before the first."""
        if not self._times.are_known:
            return None
        step = min(tokens, self._budget)
        return self._times.seconds(step) * tokens / step

    def tokens_in(self, seconds: float) -> float:
        """Estimate the prompt tokens that full steps compute in a time; 0 before the first."""
        full = self.prompt_seconds(self._largest)
        return seconds * self._largest / full if full else 0.0

    # -- before a step ----------------------------------------------------------------------

    def begin_step(self) -> int:
        """Begin to put a step together; returns the tokens it may have."""
        self.lift()
        self.started = self._clock()
        self._budget = self._largest
        if self._step_seconds and self._all_times.are_known:
            self._cut_prompts()
        if self._is_on and self._times.are_known and len(self._lifecycle.accounts.busy) > 1:
            self._limit_heavy()
        return min(self._budget, self._lifecycle.running.caps.tokens)

    def _cut_prompts(self) -> None:
        """Give the step as many tokens as the time allows.

        Beside its decodes it has at least what is reserved for short prompts and ``LEAST``.
        """
        running = self._lifecycle.running
        prompts, num_decodes = running.prompts, len(running.decodes)
        if num_decodes == len(running) and not len(self._lifecycle.waiting):
            return
        share = SEVERAL_SHARE if len(self._lifecycle.accounts.busy) > 1 else 1.0
        seconds = max(share * self._step_seconds, WEIGHTS_SHARE * self._all_times.seconds(1))
        least = num_decodes + min(SHORT, self._largest // SHORT_SHARE) + LEAST
        if prompts and self._is_in_gap(prompts):
            seconds, least = BACKGROUND_SHARE * seconds, num_decodes + LEAST
        most = self._all_times.most(seconds, self._largest)
        self._budget = min(max(most, least), self._largest)

    def _is_in_gap(self, prompts: list[Sequence]) -> bool:
        """Tell whether all prompts, running and next to start, are in the background."""
        waiting = self._lifecycle.waiting
        first = (waiting.of(tenant)[0] for tenant in waiting.ready)
        return all(s.is_background for s in prompts) and all(s.is_background for s in first)

    def _limit_heavy(self) -> None:
        """Limit the heavy tenants of this step."""
        wanted, foreground = self._tokens_wanted()
        if not foreground:
            return
        accounts = self._lifecycle.accounts.busy
        weights = {tenant: accounts[tenant].weight for tenant in wanted}
        levels = sorted([count / weights[tenant] for tenant, count in foreground.items()])
        self._wanted = wanted
        self._num_paced += 1
        self._level = levels[max(len(levels) - 2, 0) // 2]  # the highest is not among the others
        heavy, free = {}, {}
        least = LIKE * _share(self._level, min(weights.values()))
        if len(wanted) > 1 and max(wanted.values()) > least:  # else none is heavy
            for tenant, count in wanted.items():
                most = LIKE * _share(self._level, weights[tenant])
                if count > most:
                    heavy[tenant] = count
                    if (in_front := foreground.get(tenant, 0)) <= most:
                        free[tenant] = in_front
        light = sum(wanted.values()) - sum(heavy.values()) + sum(free.values())
        light = min(light, self._budget)
        self._light_seconds = self._times.seconds(light)
        is_due = bool(heavy) and self._times.is_due(light, self._num_paced)
        paid = {t: n - free.get(t, 0) for t, n in heavy.items()}
        limits = {t: 0 if is_due else self._affordable(t, n) for t, n in paid.items()}
        self._free = free.keys()
        self._limit({t: most for t, most in limits.items() if most < paid[t]})

    def limit_alone(self, tenant: str, seconds: float) -> None:
        """Limit a tenant that fills the step to what a step of that time computes."""
        if self._is_on and (most := self._all_times.most(seconds, self._budget)) < self._budget:
            self._limit({tenant: most})

    def lift(self) -> bool:
        """Take the limits back; returns whether there were any."""
        was_limited = bool(self._left)
        self._level = 0.0
        self._wanted, self._free, self._left, self._parts = {}, (), {}, {}
        return was_limited

    def _tokens_wanted(self) -> tuple[dict[str, int], dict[str, int]]:
        """Count the tokens that tenants with running work could compute in this step.

        Returns:
            The tokens by tenant, and those of sequences that are not in the background, if any.
        """
        lifecycle, budget = self._lifecycle, self._budget
        wanted: dict[str, int] = {}
        background: dict[str, int] = {}
        for sequence in lifecycle.running.by_age:
            count = sequence.num_tokens - sequence.num_computed_tokens
            if count := count or sequence.awaits_sample:  # such a row takes part in the step
                tenant = sequence.tenant
                wanted[tenant] = wanted.get(tenant, 0) + count
                if sequence.is_background:
                    background[tenant] = background.get(tenant, 0) + count
        foreground = {}
        accounts, ready = lifecycle.accounts.busy, lifecycle.waiting.ready
        if not lifecycle.running.num_free_slots:
            ready = {}
        for tenant, count in wanted.items():
            behind = background.get(tenant, 0)
            if count < budget and (queue := ready.get(tenant)) is not None:
                oldest = queue.by_age[0]
                if accounts[tenant].may_run(oldest.group):
                    waiting = len(queue.ready) * oldest.num_tokens  # an estimate
                    count += waiting
                    behind += waiting * oldest.is_background
            wanted[tenant] = count if count < budget else budget
            if count > behind:
                foreground[tenant] = min(count - behind, budget)
        return wanted, foreground

    def _share(self, tenant: str) -> int:
        return _share(self._level, self._lifecycle.accounts[tenant].weight)

    def _affordable(self, tenant: str, wanted: int) -> int:
        """Return the tokens that the tenant's credit pays for now."""
        seconds, credit = self._light_seconds, self._credit(tenant)
        price = self._price(tenant)
        credit.refill = max((self._slowdown - 1.0) * seconds, self._share(tenant) * price)
        full = PATIENCE * credit.refill
        saved = credit.seconds + (self._num_paced - credit.at) * credit.refill
        # a refill that has become smaller would take longer to pay a debt of larger ones
        credit.seconds = max(min(saved, full), -MOST_DEBT * credit.refill)
        credit.at = self._num_paced
        count = int(credit.seconds / price) if credit.seconds > 0.0 else 0
        if count < min(wanted, LEAST) and credit.seconds < full:
            return 0
        return max(count, 1)

    def _limit(self, limits: dict[str, int]) -> None:
        """Divide each tenant's tokens among its running sequences, in turn, and its waiting ones.

        A turn goes round in tree order, so that sequences with a common prefix stay together;
        background sequences come last. One that computes a prefix which another tenant waits for
        is not limited; the tenant pays for it.
        """
        lifecycle, own = self._lifecycle, {tenant: list[Sequence]() for tenant in limits}
        if not limits:
            return
        awaited_by = lifecycle.waiting.awaited_nodes()
        for sequence in lifecycle.running.order.sequences:
            if (known := own.get(sequence.tenant)) is not None:
                known.append(sequence)
        for tenant, most in limits.items():
            credit, turn = self._credit(tenant), own[tenant]
            after = next((i + 1 for i, s in enumerate(turn) if s.slot == credit.last), 0)
            turn = turn[after:] + turn[:after]
            if lifecycle.running.num_background:
                turn.sort(key=lambda s: s.is_background)
            kept = most // _NEW_STARTS if lifecycle.waiting.num_ready(tenant) else 0
            awaited = {node for node, of in awaited_by.items() if of != {tenant}}
            is_free, left = tenant in self._free, most - kept
            for sequence in turn:
                part = sequence.num_tokens - sequence.num_computed_tokens
                chunks = sequence.chunks if awaited else None
                is_awaited = chunks is not None and not awaited.isdisjoint(chunks.path)
                if not (is_awaited or (is_free and not sequence.is_background)):
                    part = part if part < left else left
                    left -= part
                    if part and not sequence.is_background:
                        credit.last = sequence.slot
                self._parts[sequence] = part
            self._left[tenant] = left + kept

    def _credit(self, tenant: str) -> _Credit:
        credit = self._credits.get(tenant)
        if credit is None:
            credit = self._credits[tenant] = _Credit()
        return credit

    def _price(self, tenant: str) -> float:
        """Return the seconds that a token of the tenant adds to the step."""
        price = self._credit(tenant).price
        if price is None:
            price = self._usual_price
        least = GUESS if price is None else _FREE
        return max(price or 0.0, least * self._light_seconds)

    # -- while a step is put together -------------------------------------------------------

    @property
    def reserve(self) -> int:
        """Tokens of the step that are reserved for short and new prompts."""
        full = self._largest // SHORT_SHARE
        return max(self._budget // SHORT_SHARE, min(SHORT, full), 1)

    @property
    def is_limiting(self) -> bool:
        """Some tenant has a limit in the step."""
        return bool(self._left)

    def may_start(self, sequence: Sequence) -> bool:
        """Tell whether a waiting sequence may have a token of the step."""
        tenant = sequence.tenant
        if self._is_free(sequence):
            return True
        if self._level and tenant not in self._left and tenant not in self._wanted:
            least = LIKE * self._share(tenant)
            if least >= self._budget:  # of the whole step
                return True
            self._left[tenant] = max(self._affordable(tenant, NO_LIMIT), least)
        return self._left.get(tenant, 1) > 0

    def most(self, sequence: Sequence) -> int:
        """Return the tokens that the sequence may have."""
        left = self._left.get(sequence.tenant)
        if left is None or self._is_free(sequence):
            return NO_LIMIT
        part = self._parts.get(sequence)
        return left if part is None else part

    def take_new(self, sequence: Sequence, count: int) -> None:
        """Note that a sequence which has just started has ``count`` tokens of the step."""
        if sequence.tenant in self._left and not self._is_free(sequence):
            self._left[sequence.tenant] -= count

    def _is_free(self, sequence: Sequence) -> bool:
        return sequence.tenant in self._free and not sequence.is_background

    # -- after it ---------------------------------------------------------------------------

    def launch(self, scheduled: list[Sequence], awaiting: list[Sequence]) -> None:
        """Note the step's sequences; rows that are only sampled count as one token.

        A step of such rows alone runs no model, and its time says nothing about others.
        """
        tokens: dict[str, int] = {}
        self._tokens, self._num_free_tokens = tokens, 0
        free = self._free
        for sequence in scheduled:
            tenant = sequence.tenant
            count = sequence.num_scheduled + len(sequence.draft.token_ids)
            if tenant in free and not sequence.is_background:
                self._num_free_tokens += count
            else:
                tokens[tenant] = tokens.get(tenant, 0) + count
        for sequence in awaiting if scheduled else ():
            tenant = sequence.tenant
            tokens[tenant] = tokens.get(tenant, 0) + 1

    def end_step(self) -> None:
        """Take in the time of the step in flight."""
        tokens, light = self._tokens, self._num_free_tokens
        if not (tokens or light) or (seconds := self._clock() - self.started) <= 0.0:
            return
        self.last_seconds = seconds
        light += sum(tokens.values())
        self._all_times.add(light, seconds)
        heavy = {
            tenant: count
            for tenant, count in tokens.items()
            if self._level and count > LIKE * self._share(tenant)
        }
        charged = sum(heavy.values())
        if light == charged or not charged:
            self._times.add(light, seconds)
            return
        light -= charged
        excess = max(seconds - self._times.seconds(light), 0.0)
        costs = {tenant: count * self._price(tenant) for tenant, count in heavy.items()}
        whole = sum(costs.values())
        for tenant, count in heavy.items():
            self._charge(self._credit(tenant), excess * costs[tenant] / whole, count)

    def _charge(self, credit: _Credit, seconds: float, count: int) -> None:
        credit.seconds = max(credit.seconds - seconds, -MOST_DEBT * credit.refill)
        price = seconds / count
        if credit.price is not None:
            price = min(price, LARGEST * max(credit.price, _FREE * self._light_seconds))
            price = credit.price + WEIGHT * (price - credit.price)
        credit.price = self._usual_price = price


def _share(level: float, weight: float) -> int:
    """Return the tokens of a tenant's share, at least 1."""
    return max(round(level * weight), 1)
