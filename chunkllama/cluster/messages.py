"""Messages between a front end and a replica, beside those to an engine of ``messages.py``."""

from __future__ import annotations

from typing import Final

import msgspec

from chunkllama.cache_messages import EndedPin
from chunkllama.messages import EngineStats, ToEngine, TokenDelta

Spending = tuple[float, float]  # requests and tokens
REPEATED: Final = -1  # command_id of a drop that front ends know of already


class Beat(msgspec.Struct, kw_only=True, tag="beat"):
    """Sent each second, and when something of it changes: the replica lives.

    Attributes:
        is_draining: it takes no new requests and ends when those it has are finished.
        stats: of its engine, if they are newer than those of the beat before.
        heads: what its engine has cached, level by level from the root, if that has changed; see
            ``prefix_keys.py``.
    """

    is_draining: bool = False
    stats: EngineStats | None = None
    heads: list[list[int]] | None = None


class Ended(msgspec.Struct, kw_only=True, tag="ended"):
    """Last message of a replica whose engine has ended, or that has drained.

    Attributes:
        reason: in one line.
        running: ids of the requests in the step that was not finished.
    """

    reason: str
    running: list[str] = []


class Spent(msgspec.Struct, kw_only=True, tag="spent"):
    """What tenants have spent of their rates at one front end; a replica hands it to the others."""

    tenants: dict[str, Spending]


class Dropped(msgspec.Struct, kw_only=True, tag="dropped"):
    """What an operator has dropped through one front end; the replica tells all of them, so that
    none brings it back.

    Attributes:
        tenant: whose chunks were dropped; None: no tenant's.
        drop_id: of the command. Each replica reports the drop, of which one is applied. 0: none.
        ended_pins: pins that were ended.
    """

    tenant: str | None = None
    drop_id: int = 0
    ended_pins: list[EndedPin] = []


FromReplica = TokenDelta | Beat | Ended | Spent | Dropped
ToReplica = ToEngine | Spent

ENCODER = msgspec.msgpack.Encoder()
FROM_REPLICA = msgspec.msgpack.Decoder(list[FromReplica])
TO_ENGINE = msgspec.msgpack.Decoder(list[ToEngine])
TO_REPLICA = msgspec.msgpack.Decoder(list[ToReplica])
