"""From an engine request to its group of sequences; refuses what could never run."""

from __future__ import annotations

import numpy as np

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.messages import EngineRequest
from chunkllama.scheduler.admission import AdmissionControl
from chunkllama.scheduler.beam import BeamSearch
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.request import Sequence, SequenceGroup
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.tenants import Account
from chunkllama.tenant_limits import TenantLimits


def make_group(
    request: EngineRequest,
    limits: SchedulerLimits,
    admission: AdmissionControl,
    arrival: int,
    now: float,
    adapter: AdapterUse | None = None,
) -> SequenceGroup:
    """Make the request's group with a sequence for each choice that is not finished.

    Args:
        arrival: number in order of arrival.
        now: monotonic seconds.
        adapter: that the request uses.

    Raises:
        InvalidRequestError: the request could never run; the message names the field.
    """
    _check(request, limits)
    assert request.sampling.seed is not None, "the client draws the seed"
    group = SequenceGroup(
        request=request,
        arrival=arrival,
        arrived_at=now,
        max_tokens=admission.resolve_max_tokens(request),
        collects_prompt_logprobs=request.sampling.prompt_logprobs is not None,
        adapter=adapter,
        prediction=np.array(request.prediction_token_ids, np.int32),
    )
    if request.sampling.beam_width > 1:
        group.beam = BeamSearch(request.sampling, group.max_tokens, limits.eos_token_ids)
    _make_sequences(group, limits)
    return group


def _check(request: EngineRequest, limits: SchedulerLimits) -> None:
    sampling = request.sampling
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt must have at least one token", "prompt")
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
        raise InvalidRequestError(
            "max_tokens 0 needs prompt_logprobs: nothing would be returned", "max_tokens"
        )
    if request.wants_hidden_states and sampling.num_sequences > 1:
        raise InvalidRequestError(
            f"a prompt has one embedding; n and best_of must be 1, got {sampling.num_sequences}",
            "n",
        )
    width = sampling.beam_width
    if width > 1 and sampling.max_tokens == 0:
        raise InvalidRequestError("beam search needs max_tokens of at least 1", "max_tokens")
    if width > 1 and not sampling.num_sequences <= width <= limits.max_num_seqs:
        raise InvalidRequestError(
            f"beam_width must be in [n={sampling.num_sequences}, max_num_seqs="
            f"{limits.max_num_seqs}], got {width}",
            "beam_width",
        )


def _make_sequences(group: SequenceGroup, limits: SchedulerLimits) -> None:
    request, asked = group.request, group.request.sampling.num_sequences
    if len(request.delivered) > asked:
        raise InvalidRequestError(
            f"delivered has {len(request.delivered)} choices, the request {asked}", "delivered"
        )
    prompt = np.array(request.prompt_token_ids, np.int32)
    # Beams and pooled prompts return nothing before they end: they restart with one sequence.
    starts_alone = group.beam is not None or request.wants_hidden_states != ""
    for index in range(1 if starts_alone else asked):
        given = not starts_alone and index < len(request.delivered)
        delivered = request.delivered[index] if given else []
        tokens = np.append(prompt, np.array(delivered, np.int32)) if delivered else prompt
        sequence = Sequence(group, index, tokens)
        if sequence.finish_reason(limits.eos_token_ids)[0] is None:
            group.sequences[index] = sequence
    if not group.sequences:
        raise InvalidRequestError("every choice has been delivered whole", "delivered")


def check_places(tenant: str, limits: SchedulerLimits, lifecycle: SequenceLifecycle) -> None:
    """Refuse a request beyond the queue's places, or its tenant's.

    A tenant with limits may have ``max_queued_requests`` and ``queue_share * max_waiting`` requests
    that wait; those that can start at once do not count. Without limits, a tenant's waiting
    requests may be as many as the places still free: one tenant takes at most half of them, and k
    tenants leave 1 / (k + 1) (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).
    Requests without a tenant have no such limit.

    Raises:
        OverloadedError: with the seconds to wait.
    """
    total, account = len(lifecycle.groups), lifecycle.accounts.get(tenant)
    free = limits.max_num_seqs + limits.max_waiting - total
    own, most = account.num_requests, _most_waiting(account.limits, limits)
    if free <= 0:
        reason = (
            f"{total} requests are running or waiting, and the server takes no more (max_waiting)"
        )
    elif most is None and tenant and own - limits.max_num_seqs >= free:
        reason = (
            f"{own} requests of this API key are running or waiting, and it may have "
            f"{limits.max_num_seqs + free}: as many as are free of max_waiting may wait"
        )
    elif most is not None and account.num_waiting - _num_starting(account, lifecycle) >= most:
        reason = (
            f"{account.num_waiting} requests of this API key are waiting, and it may have {most} "
            "(max_queued_requests, queue_share)"
        )
    else:
        return
    admission = lifecycle.admission
    raise OverloadedError(
        f"{reason}; try again when some have ended",
        admission.drain.seconds_for(lifecycle.waiting.num_chunks),
    )


def _most_waiting(tenant: TenantLimits, limits: SchedulerLimits) -> int | None:
    """Requests of a tenant that may wait; None is no limit of its own."""
    share = None if tenant.queue_share is None else int(tenant.queue_share * limits.max_waiting)
    both = [most for most in (tenant.max_queued_requests, share) if most is not None]
    return min(both, default=None)


def _num_starting(account: Account, lifecycle: SequenceLifecycle) -> int:
    """Waiting requests of a tenant for which slots are free."""
    free = lifecycle.running.num_free_slots
    most = account.limits.max_concurrent_requests
    return free if most is None else min(free, max(most - account.num_running, 0))
