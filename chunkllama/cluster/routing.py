"""Which replica gets a request: the one that has most of its prompt, unless it is too busy.

The logic of every front end, without any transport. It keeps a bounded index of prefix keys
(``prefix_keys.py``) with the replicas, *homes*, that are believed to hold each prefix. Replicas
correct the belief with digests of their trees. A prompt that no replica has goes where rendezvous
hashing (Thaler and Ravishankar, 1998) with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018)
puts the deepest prefix that was seen before, so that all front ends choose the same replica.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from chunkllama.cluster.prefix_keys import HEAD_LEVELS

Why = Literal["match", "cold", "spill", "retry"]
BoolArray = NDArray[np.bool_]
Int64Array = NDArray[np.int64]

SHARE_BOUND: Final = 1.25  # of the mean, that a replica's or a home's part of the requests may be
WINDOW: Final = 256  # requests of a replica after which earlier ones count half


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica for one request.

    Attributes:
        why: "match": it has most of the prompt; "cold": no replica has any; "spill": one that has
            more is too busy, cannot admit the request or has its share; "retry": another replica
            failed or refused.
        num_matched: leading chunks of the prompt that it is believed to have.
        num_chunks: that the request needs, as given to ``choose``.
        keys: of the prompt.
    """

    replica: str
    why: Why
    num_matched: int
    num_chunks: int
    keys: Sequence[int]


class _Prefix:
    """One prefix of the index.

    Attributes:
        depth: index of its last chunk in the prompt.
        homes: one bit for each replica believed to have it.
        count: requests with it, halved once in each epoch after ``epoch``.
    """

    __slots__ = ("count", "depth", "epoch", "homes")

    def __init__(self, depth: int, epoch: int) -> None:
        self.depth = depth
        self.homes = 0
        self.count = 0.0
        self.epoch = epoch


class _Replica:
    """What is kept of one replica beside the arrays.

    Attributes:
        heads: prefixes of at most ``HEAD_LEVELS`` chunks in the index that have it as a home.
        in_flight: of those, how many requests that were sent there and have not ended have each.
    """

    def __init__(self, name: str, slot: int) -> None:
        self.name = name
        self.slot = slot
        self.bit = 1 << slot
        self.heads: set[int] = set()
        self.in_flight: Counter[int] = Counter()


class PrefixRouting:
    """Chooses replicas by prompt prefix and load.

    Args:
        spill: a replica with that many requests more than the idlest gets no more for its prefixes.
        index_chunks: most prefixes kept; the least recently used are dropped.

    Attributes:
        counts: requests routed, by reason.
    """

    def __init__(self, *, spill: int = 8, index_chunks: int = 262_144) -> None:
        self.counts: dict[Why, int] = dict.fromkeys(get_args(Why), 0)
        self._spill = spill
        self._max_prefixes = index_chunks
        # by last use, and of one prompt the deepest first
        self._index: OrderedDict[int, _Prefix] = OrderedDict()
        self._replicas: dict[str, _Replica] = {}
        self._by_slot: list[_Replica | None] = []
        self._epoch = 0
        self._total = 0.0
        # by slot
        self._seeds: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._usable: BoolArray = np.zeros(0, np.bool_)
        self._own = np.zeros(0, np.int64)  # requests of this front end
        self._others = np.zeros(0, np.int64)  # of other ones, as last reported
        self._free = np.zeros(0, np.float64)  # chunks
        self._recent = np.zeros(0, np.float64)  # requests, earlier ones with a lower weight
        self._placed = np.zeros(0, np.float64)  # of those, the ones placed by rendezvous

    # -- replicas ---------------------------------------------------------------------------

    @property
    def replicas(self) -> list[str]:
        """Names of the replicas that get requests."""
        return [name for name, each in self._replicas.items() if self._usable[each.slot]]

    def add(self, replica: str) -> None:
        """Let a replica get requests; one that was draining gets them again.

        A name stands for one process: a restarted replica needs another one.
        """
        known = self._replicas.get(replica)
        if known is not None:
            self._usable[known.slot] = True
            return
        if None in self._by_slot:
            slot = self._by_slot.index(None)
        else:
            slot = len(self._by_slot)
            self._by_slot.append(None)
            self._grow()
        made = _Replica(replica, slot)
        self._by_slot[slot] = self._replicas[replica] = made
        seed = hashlib.sha256(replica.encode()).digest()[:8]
        self._seeds[slot] = int.from_bytes(seed, "big")
        self._usable[slot] = True
        self._own[slot] = self._others[slot] = 0
        self._free[slot] = math.inf
        if len(self.replicas) > 1:  # lower values would send it every cold prompt at first
            others = self._usable.copy()
            others[slot] = False
            self._recent[slot] = self._recent[others].mean()
            self._placed[slot] = self._placed[others].mean()

    def drain(self, replica: str) -> None:
        """Send a replica no more requests; what it has of them may end."""
        self._usable[self._replicas[replica].slot] = False

    def remove(self, replica: str) -> None:
        """Forget a replica and what it had; its requests are over."""
        gone = self._replicas.pop(replica)
        self._by_slot[gone.slot] = None
        self._usable[gone.slot] = False
        self._recent[gone.slot] = self._placed[gone.slot] = 0.0
        for prefix in self._index.values():
            prefix.homes &= ~gone.bit

    def report(self, replica: str, num_requests: int, free_chunks: int | None = None) -> None:
        """Note a replica's running and waiting requests, and chunks it can give to new ones."""
        slot = self._replicas[replica].slot
        self._others[slot] = max(num_requests - int(self._own[slot]), 0)
        self._free[slot] = math.inf if free_chunks is None else free_chunks

    def load(self, replica: str) -> int:
        """Return the requests that a replica is believed to have, waiting or running."""
        slot = self._replicas[replica].slot
        return int(self._own[slot] + self._others[slot])

    def apply_digest(self, replica: str, heads: Sequence[Collection[int]]) -> None:
        """Correct what a replica is believed to have.

        Prefixes that it has lost hide all that continue them. Those of requests in flight stay:
        a request that waits has no chunk yet.

        Args:
            heads: keys of all it has, level by level from the root (``tree_heads``).
        """
        owner = self._replicas[replica]
        present: set[int] = set().union(*heads)
        for key in owner.heads - present:
            prefix = self._index[key]
            if prefix.depth < len(heads) and key not in owner.in_flight:
                prefix.homes &= ~owner.bit
                owner.heads.discard(key)
        for depth in reversed(range(min(len(heads), HEAD_LEVELS))):
            for key in heads[depth]:
                if key not in owner.heads:
                    self._believe(self._touch(key, depth), key, owner)
        self._shrink()

    # -- requests ---------------------------------------------------------------------------

    def choose(
        self, keys: Sequence[int], *, num_chunks: int = 0, avoid: Collection[str] = ()
    ) -> Choice | None:
        """Choose a replica; None if there is none. Nothing is recorded.

        Args:
            keys: of the prompt, from ``prefix_keys``.
            num_chunks: that the request needs, cached ones included; 0: any replica can admit it.
            avoid: replicas that failed or refused it.
        """
        usable = self._usable
        if avoid:
            usable = usable.copy()
            for name in avoid:
                if name in self._replicas:
                    usable[self._replicas[name].slot] = False
        if not usable.any():
            return None
        load = self._own + self._others
        calm = usable & (load - load[usable].min() <= self._spill)
        num_seen, matched = self._matches(keys, usable)
        roomy = calm & (self._free >= num_chunks - matched)
        allowed = roomy if roomy.any() else calm
        most = int(matched.max())
        homes = allowed & (matched > 0)
        why: Why = "spill" if most else "cold"
        if homes.any():
            slot = self._first(homes, -matched, load)
            if matched[slot] == most:
                why = "match"
                others = allowed & (matched < most) & (load <= load[slot])
                if others.any() and self._is_hot(keys[most - 1], matched == most, usable):
                    why, slot = "spill", self._rendezvous(keys[most - 1], others, usable)
        elif keys:
            slot = self._rendezvous(keys[max(num_seen, 1) - 1], allowed, usable)
        else:
            slot = self._first(allowed, load)
        chosen = self._by_slot[slot]
        assert chosen is not None
        why = "retry" if avoid else why
        return Choice(chosen.name, why, int(matched[slot]), num_chunks, keys)

    def num_elsewhere(self, keys: Sequence[int], replica: str) -> int:
        """Return the most leading chunks of a prompt that another replica is believed to have."""
        others = self._usable.copy()
        others[self._replicas[replica].slot] = False
        return int(self._matches(keys, others)[1][others].max(initial=0))

    def record(self, choice: Choice) -> None:
        """Note that a request was sent to the replica chosen for it."""
        self.counts[choice.why] += 1
        owner = self._replicas.get(choice.replica)
        if owner is None:
            return
        self._own[owner.slot] += 1
        self._free[owner.slot] -= max(choice.num_chunks - choice.num_matched, 0)
        self._recent[owner.slot] += 1
        self._placed[owner.slot] += choice.num_matched == 0
        self._total += 1
        if self._total >= WINDOW * len(self._replicas):
            self._total /= 2
            self._recent /= 2
            self._placed /= 2
            self._epoch += 1
        for depth in reversed(range(len(choice.keys))):
            key = choice.keys[depth]
            prefix = self._touch(key, depth)
            if prefix.epoch != self._epoch:
                prefix.count, prefix.epoch = self._count(prefix), self._epoch
            prefix.count += 1
            if not prefix.homes & owner.bit:
                self._believe(prefix, key, owner)
        owner.in_flight.update(choice.keys[:HEAD_LEVELS])
        self._shrink()

    def finished(self, choice: Choice) -> None:
        """Note that a recorded request has ended, however it ended."""
        owner = self._replicas.get(choice.replica)
        if owner is None:
            return
        self._own[owner.slot] -= 1
        for key in choice.keys[:HEAD_LEVELS]:
            owner.in_flight[key] -= 1
            if not owner.in_flight[key]:
                del owner.in_flight[key]

    def check_invariants(self) -> None:
        """Check that the index is bounded and agrees with the replicas."""
        assert len(self._index) <= self._max_prefixes
        live = sum(each.bit for each in self._replicas.values())
        heads: dict[int, set[int]] = {each.bit: set() for each in self._replicas.values()}
        for key, prefix in self._index.items():
            assert prefix.homes & ~live == 0
            if prefix.depth < HEAD_LEVELS:
                for each in self._owners(prefix.homes):
                    heads[each.bit].add(key)
        for each in self._replicas.values():
            assert heads[each.bit] == each.heads
            assert all(count > 0 for count in each.in_flight.values())
            assert self._own[each.slot] >= 0 and self._others[each.slot] >= 0

    # -- the choice -------------------------------------------------------------------------

    def _matches(self, keys: Sequence[int], usable: BoolArray) -> tuple[int, Int64Array]:
        """Return how many leading chunks were seen before, and how many each replica has."""
        matched = np.zeros(len(usable), np.int64)
        num_seen = 0
        homes = int.from_bytes(np.packbits(usable, bitorder="little").tobytes(), "little")
        for key in keys:
            prefix = self._index.get(key)
            if prefix is None:
                break
            remaining = homes & prefix.homes
            if remaining != homes:
                matched[self._slots(homes & ~remaining)] = num_seen
                homes = remaining
            num_seen += 1
        matched[self._slots(homes)] = num_seen
        return num_seen, matched

    def _first(self, allowed: BoolArray, *order: Int64Array) -> int:
        """Return the allowed slot that comes first; of equal ones, that with the least requests."""
        slots = np.flatnonzero(allowed)
        ranks = [values[slots] for values in (self._recent, *reversed(order))]
        return int(slots[np.lexsort(ranks)[0]])

    def _is_hot(self, key: int, homes: BoolArray, usable: BoolArray) -> bool:
        """Whether a prefix has more requests than its homes' share of all."""
        share = SHARE_BOUND * self._total * int(homes.sum()) / int(usable.sum())
        return self._count(self._index[key]) > share + self._spill

    def _rendezvous(self, key: int, allowed: BoolArray, usable: BoolArray) -> int:
        """Return the allowed slot with the highest vote among those below their bounds."""
        for amounts in (self._placed, self._recent, self._own + self._others):
            total = float(amounts[usable].sum())
            bound = math.ceil(SHARE_BOUND * (total + 1) / int(usable.sum()))
            below = allowed & (amounts < bound)
            allowed = below if below.any() else allowed
        slots = np.flatnonzero(allowed)
        return int(slots[_mix(self._seeds[slots] ^ np.uint64(key)).argmax()])

    # -- the index --------------------------------------------------------------------------

    def _touch(self, key: int, depth: int) -> _Prefix:
        prefix = self._index.get(key)
        if prefix is None:
            prefix = self._index[key] = _Prefix(depth, self._epoch)
        else:
            self._index.move_to_end(key)
        return prefix

    def _believe(self, prefix: _Prefix, key: int, owner: _Replica) -> None:
        prefix.homes |= owner.bit
        if prefix.depth < HEAD_LEVELS:
            owner.heads.add(key)

    def _shrink(self) -> None:
        while len(self._index) > self._max_prefixes:
            key, prefix = self._index.popitem(last=False)
            for owner in self._owners(prefix.homes):
                owner.heads.discard(key)

    def _count(self, prefix: _Prefix) -> float:
        return math.ldexp(prefix.count, prefix.epoch - self._epoch)

    def _owners(self, mask: int) -> Iterator[_Replica]:
        while mask:
            lowest = mask & -mask
            owner = self._by_slot[lowest.bit_length() - 1]
            assert owner is not None
            yield owner
            mask ^= lowest

    def _slots(self, mask: int) -> BoolArray:
        size = len(self._by_slot)
        encoded = np.frombuffer(mask.to_bytes(-(-size // 8), "little"), np.uint8)
        return np.unpackbits(encoded, count=size, bitorder="little").view(np.bool_)

    def _grow(self) -> None:
        for name in ("_seeds", "_usable", "_own", "_others", "_free", "_recent", "_placed"):
            values = getattr(self, name)
            setattr(self, name, np.append(values, np.zeros(1, values.dtype)))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers (the finalizer of SplitMix64, Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
