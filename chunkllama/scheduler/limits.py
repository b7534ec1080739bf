"""Limits of the scheduler, resolved once by the engine builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from chunkllama.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Limits and policies of one scheduler.

    Attributes:
        max_num_seqs: sequences running at once; also the number of device slots.
        max_num_batched_tokens: tokens computed in one step.
        max_model_len: tokens of prompt and output together.
        max_waiting: requests accepted beyond ``max_num_seqs``; one more is refused.
        policy: order of waiting requests; see ``queue.py``.
        fair_quantum: virtual tokens that a group of requests or a tenant may run ahead.
        tenant_weights: share of each tenant relative to others; 1 for those not listed.
        max_tenant_slowdown: most that one tenant's work may lengthen the steps of others, as a
            factor, with policy ``fair``; 0 is no bound.
        max_step_seconds: prompts of a step are cut where it would take longer; 0 is no bound.
        scored_tokens_per_step: prompt tokens of one request in a step whose log-probabilities it
            wants.
        min_wait_tokens: a follower waits for its leader only if that saves this many tokens.
        spare_chunks: chunks kept beyond a tail, so that a decode plan lives longer.
        eos_token_ids: tokens that end a choice unless it ignores them.
        enable_prefix_caching: False shares nothing between sequences and keeps nothing.
        speculates: check guesses at the next tokens where that saves time; see ``drafts.py``.
        reserve_quantile: quantile of finished output lengths that admission reserves room for.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_waiting: int
    policy: Literal["fair", "prefix", "fcfs"]
    min_wait_tokens: int
    enable_prefix_caching: bool
    fair_quantum: int
    max_tenant_slowdown: float
    max_step_seconds: float
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    spare_chunks: int = 1
    scored_tokens_per_step: int = 2**31 - 1
    eos_token_ids: frozenset[int] = frozenset()
    speculates: bool = False
    reserve_quantile: float = 0.75

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: a step could not hold one token of each"
            )
        if self.max_model_len < 1 or self.max_waiting < 0 or self.spare_chunks < 0:
            raise ConfigError("max_model_len, max_waiting and spare_chunks cannot be negative")
        if self.min_wait_tokens < 0:
            raise ConfigError(f"min_wait_tokens cannot be negative, got {self.min_wait_tokens}")
        if self.fair_quantum < 1:
            raise ConfigError(f"fair_quantum must be at least 1, got {self.fair_quantum}")
        if self.max_tenant_slowdown < 0 or 0 < self.max_tenant_slowdown < 1:
            raise ConfigError(
                f"max_tenant_slowdown must be at least 1 or 0, got {self.max_tenant_slowdown}"
            )
        for tenant, weight in self.tenant_weights.items():
            if not 0.001 <= weight <= 1000:
                raise ConfigError(
                    f"tenant_weights: the weight of {tenant} must be in [0.001, 1000], got {weight}"
                )
