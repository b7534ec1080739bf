"""What a front end keeps of each replica, and of each request that it has sent to one."""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkllama.cluster.commands import Channel
from chunkllama.cluster.routing import Choice
from chunkllama.messages import TokenDelta


@dataclass(slots=True, eq=False)
class Replica:
    """A replica as a front end knows it.

    Attributes:
        number: unique in this front end, for ids of chunks.
    """

    channel: Channel
    number: int
    is_draining: bool = False


@dataclass(slots=True, eq=False)
class Route:
    """Where a request is, and what became of it before.

    Attributes:
        keys: of its prompt's prefixes.
        choice: of the replica that has it; None while none has it.
        failures: replicas that ended under it.
        gained: tokens that it had at the last failure.
        refusals: of replicas that had no room for it.
        lost_at: monotonic time of a failure after which it has no token yet.
        num_elsewhere: tokens of its prompt that other replicas had when it was sent, if it is to be
            explained.
        trial_deltas: that it got since it is the one that is tried.
    """

    keys: list[int]
    choice: Choice | None = None
    failures: int = 0
    gained: int = 0
    refusals: dict[str, TokenDelta] = field(default_factory=dict)
    lost_at: float | None = None
    num_elsewhere: int = 0
    trial_deltas: int = 0
