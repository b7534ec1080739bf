"""A second residence of chunks, in memory or on disk: what the pool evicts is read again on demand.

    pool ──evicted──► being written ──► in a file ──a prompt wants it──► in a file and in the pool
                                           │
                                           └─ over the budget, dropped, damaged ──► gone

The tier knows tokens and numbers of files, wherever those are, and does no I/O: a ``TierStore`` is
called with what is to be written, read and removed. Its entries form a tree as the nodes of the
pool do, and token ids are compared exactly. An entry without a file stands for a chunk above
others: leaves are evicted first, so that the chunks above them are mostly still in the pool. A
chunk that is read keeps its file; when the pool evicts it again, nothing is written.

The budget is in bytes, and a store says how many a chunk takes. Beyond it, the order of
``eviction.py`` decides whose are removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from chunkllama.cache.adapter_tags import adapter_of
from chunkllama.cache.eviction import EvictionOrder
from chunkllama.cache.matching import Match
from chunkllama.cache.node import PUBLIC, TOKEN_BYTES, Node
from chunkllama.cache.tier_entry import (
    NO_FILE,
    Form,
    Promotion,
    ReadLimits,
    ReadPrice,
    TierEntry,
    Wait,
)


class TierStore(Protocol):
    """Moves K/V between pool and files. Nothing is called while a step is in flight."""

    def form(self, depth: int) -> Form:
        """How a chunk with so many above it is kept."""
        ...

    def residences(self) -> tuple[int, int]:
        """Bytes in memory and in files, without what is being written."""
        ...

    def accepts(self) -> bool:
        """Whether another chunk can be written."""
        ...

    def write(self, entry: TierEntry, chunk_id: int) -> None:
        """Copy a chunk now and write it later; ``Tier.written`` follows, or ``Tier.close``."""
        ...

    def read(self, promotion: Promotion) -> None:
        """Begin to read; ``imports.promote_next`` follows for each chunk, and ``Tier.end``."""
        ...

    def remove(self, file: int) -> None:
        """Remove a file, which may still be being written."""
        ...


class Tier:
    """What is in the files.

    Args:
        budget: most bytes.
        chunk_size: tokens of a chunk.
        store: moves K/V.

    Attributes:
        budget: as given.
        capacity: chunks below others that the budget is enough for.
        num_bytes: of the files.
        rounds: some files are rounded.
        order: of eviction.
        price: of reading.
        promotions: those that are not done.
        written_total, promoted_total, damaged_total: chunks.
    """

    def __init__(self, budget: int, chunk_size: int, store: TierStore) -> None:
        form = store.form(1)
        self.budget = budget
        self.capacity = budget // form.num_bytes
        self.num_bytes = 0
        self.rounds = form.bits > 0
        self.order: EvictionOrder[TierEntry] = EvictionOrder(self.capacity)
        self.price = ReadPrice()
        self.promotions: list[Promotion] = []
        self.written_total = self.promoted_total = self.damaged_total = 0
        self._size = chunk_size
        self._store = store
        self._root = TierEntry(None, PUBLIC, b"")
        self._files: dict[int, TierEntry] = {}
        self._next_file = 0
        self._tick = 0

    @property
    def num_chunks(self) -> int:
        """Chunks that have a file, or are being written."""
        return len(self._files)

    def residences(self) -> tuple[int, int]:
        """Bytes in memory and in files, without what is being written."""
        return self._store.residences()

    # -- from the pool ------------------------------------------------------------------------

    def evicted(self, node: Node) -> None:
        """Keep a whole chunk that is about to leave the pool, if there is room."""
        if node.filled < self._size:
            return
        known = self._find(node)
        if known is not None and known.file != NO_FILE:
            self._touch(known)
            return
        form = self._store.form(node.depth)
        if not self._store.accepts() or not self._make_room(form.num_bytes):
            return
        entry = self._find_or_add(node)
        entry.owner, entry.file, entry.form = node.owner, self._next_file, form
        self._next_file += 1
        self.num_bytes += form.num_bytes
        self._files[entry.file] = entry
        self.order.add(entry.owner)
        self._touch(entry)
        self._store.write(entry, node.chunk_id)

    def written(self, file: int) -> bool:
        """Note that a file is there; False: its chunk was dropped meanwhile."""
        entry = self._files.get(file)
        if entry is None:
            return False
        entry.is_written = True
        self.written_total += 1
        self._push(entry)
        return True

    def refused(self, file: int) -> None:
        """Forget a file that cannot hold its chunk."""
        if (entry := self._files.get(file)) is not None:
            self._remove(entry)

    def damaged(self, file: int) -> None:
        """Forget a file that does not hold what was written."""
        if (entry := self._files.get(file)) is not None:
            self.damaged_total += 1
            self._remove(entry)

    def close(self) -> None:
        """Forget all files, and end what is being read."""
        for promotion in [*self.promotions]:
            self.end(promotion)
        self.drop(lambda entry: True)

    def shrink(self, budget: int, kept: set[int]) -> None:
        """Continue with a smaller budget and the written ones of these files."""
        self.drop(lambda entry: entry.file not in kept or not entry.is_written)
        self.budget, self.capacity = budget, budget // self._store.form(1).num_bytes
        self.order.resize(self.capacity)
        if not self._make_room(0):
            self.drop(lambda entry: True)

    def _make_room(self, num_bytes: int) -> bool:
        if num_bytes > self.budget:
            return False
        while self.num_bytes + num_bytes > self.budget:
            entry = self.order.pop(self._tick)
            if entry is None:
                return False
            self._remove(entry)
        return True

    # -- to the pool --------------------------------------------------------------------------

    def chain(self, nodes: list[Node], key: bytes, limit: int, namespace: str) -> list[TierEntry]:
        """Chunks in files that continue a path of whole nodes, within ``limit`` tokens of ``key``;
        changes nothing."""
        entry = self._find(nodes[-1]) if nodes else self._root
        width = self._size * TOKEN_BYTES
        chain: list[TierEntry] = []
        if entry is None:
            return chain
        for start in range(len(nodes) * width, limit // self._size * width, width):
            entry = _readable(entry, key[start : start + width], namespace)
            if entry is None:
                break
            chain.append(entry)
        return chain

    def extended(self, match: Match, key: bytes, limit: int, namespace: str) -> tuple[Match, int]:
        """Return what a match would be if what continues it were read, and the tokens read; for
        explanations."""
        num_read = len(self.chain(match.nodes, key, limit, namespace)) * self._size
        num_tokens = max(match.num_tokens, len(match.nodes) * self._size + num_read)
        later = max(match.num_later_tokens, num_tokens)
        return match._replace(num_tokens=num_tokens, num_later_tokens=later), num_read

    def promote(
        self,
        match: Match,
        root: Node,
        key: bytes,
        limit: int,
        namespace: str,
        limits: ReadLimits,
    ) -> Wait | None:
        """Begin to read what continues a match, unless that is not worth it or does not fit.

        Args:
            root: of the pool's tree.
            key: the prompt's tokens, encoded.
            limit: tokens that may be matched.

        Returns:
            What to wait for; None: the sequence may start.
        """
        chain = self.chain(match.nodes, key, limit, namespace)
        if not chain:
            return None
        if (reading := chain[0].promotion) is not None:
            return Wait(reading)
        end = next((i for i, entry in enumerate(chain) if entry.promotion is not None), len(chain))
        chain = chain[:end]
        saved = (len(match.nodes) + len(chain)) * self._size - match.num_tokens
        if saved < max(limits.least_tokens, 1) or limits.needed_chunks > limits.available_chunks:
            return None
        if not self.price.is_lower(len(chain), limits.compute_seconds(saved)):
            return None
        needed = limits.needed_chunks + sum(each.num_needed for each in self.promotions)
        if needed > limits.available_chunks or len(self.promotions) >= limits.most_promotions:
            return Wait(None) if self.promotions else None
        above = match.nodes[-1] if match.nodes else root
        promotion = Promotion(chain, above, limits.needed_chunks)
        for entry in chain:
            entry.promotion = promotion
        self.promotions.append(promotion)
        self._store.read(promotion)
        return Wait(promotion)

    def end(self, promotion: Promotion) -> None:
        """Add no more chunks of a promotion."""
        assert not promotion.is_done
        promotion.is_done = True
        self.promotions.remove(promotion)
        self.promoted_total += promotion.num_added
        promotion.seconds = self.price.seconds(promotion.num_added)
        for entry in reversed(promotion.entries):
            entry.promotion = None
            if entry.file != NO_FILE:
                self._touch(entry)

    # -- removal ------------------------------------------------------------------------------

    def forget(self, node: Node) -> None:
        """Remove the file of a node's chunk."""
        entry = self._find(node)
        if entry is not None and entry.file != NO_FILE:
            self._remove(entry)

    def drop(self, is_dropped: Callable[[TierEntry], bool]) -> int:
        """Remove the files of some entries; returns how many."""
        dropped = [entry for entry in self._files.values() if is_dropped(entry)]
        for entry in dropped:
            self._remove(entry)
        return len(dropped)

    def drop_below(self, node: Node) -> int:
        """Remove the files of the chunks below a node; returns how many."""
        entry = self._find(node)
        if entry is None:
            return 0
        dropped = [each for each in entry.descendants() if each.file != NO_FILE]
        for each in dropped:
            self._remove(each)
        return len(dropped)

    def _remove(self, entry: TierEntry) -> None:
        """Remove a file, and the entries that stood for chunks above it alone."""
        file = entry.file
        del self._files[file]
        self.num_bytes -= entry.form.num_bytes
        entry.file, entry.is_written = NO_FILE, False
        self.order.remove(entry.owner)
        self._store.remove(file)
        step = entry
        while step.parent is not None and step.file == NO_FILE and not step.children:
            parent = step.parent
            del parent.children[step.namespace, step.key]
            step.parent = None
            step = parent
        self._push(step)

    # -- entries ------------------------------------------------------------------------------

    def _find(self, node: Node) -> TierEntry | None:
        """The entry of a whole node's chunk."""
        missing: list[Node] = []
        step = node
        while step.parent is not None and not _is_linked(step.tier_entry):
            missing.append(step)
            step = step.parent
        entry = self._root if step.parent is None else step.tier_entry
        assert entry is not None
        for step in reversed(missing):
            entry = entry.children.get((step.namespace, step.key))
            if entry is None:
                return None
            step.tier_entry = entry
        return entry

    def _find_or_add(self, node: Node) -> TierEntry:
        """The entry of a whole node's chunk, with those above it."""
        entry = self._root
        missing: list[Node] = []
        for step in node.upward():
            if step.tier_entry is not None and _is_linked(step.tier_entry):
                entry = step.tier_entry
                break
            missing.append(step)
        for step in reversed(missing):
            name = step.namespace, step.key
            child = entry.children.get(name)
            if child is None:
                child = entry.children[name] = TierEntry(entry, *name)
            step.tier_entry = entry = child
        return entry

    def _touch(self, entry: TierEntry) -> None:
        self._tick += 1
        entry.last_use = self._tick
        self._push(entry)

    def _push(self, entry: TierEntry) -> None:
        if entry.is_evictable_leaf:
            self.order.push(entry)

    def check_invariants(self) -> None:
        """Raise AssertionError if files, entries, counts and promotions do not agree."""
        assert self.num_bytes == sum(entry.form.num_bytes for entry in self._files.values())
        assert self.num_bytes <= self.budget
        reading = {id(e) for p in self.promotions for e in p.entries if e.parent is not None}
        files = 0
        for entry in self._root.descendants():
            parent = entry.parent
            assert parent is not None
            assert parent.children[entry.namespace, entry.key] is entry
            assert parent.namespace in (PUBLIC, entry.namespace), "reachable from two namespaces"
            assert adapter_of(parent.key) in (0, adapter_of(entry.key)), "below another adapter's"
            assert len(entry.key) == self._size * TOKEN_BYTES
            assert (entry.promotion is not None) == (id(entry) in reading)
            if entry.file == NO_FILE:
                assert entry.children and not entry.is_written
            else:
                assert self._files[entry.file] is entry
                files += 1
        assert files == len(self._files), "a file has no entry"
        owned = Counter(entry.owner for entry in self._files.values())
        assert all(self.order.num_nodes(owner) == count for owner, count in owned.items())
        assert all(not promotion.is_done for promotion in self.promotions)


def _readable(parent: TierEntry, key: bytes, namespace: str) -> TierEntry | None:
    """The chunk below ``parent`` that a sequence of ``namespace`` may read."""
    for scope in (PUBLIC, namespace):
        entry = parent.children.get((scope, key))
        if entry is not None and entry.is_written:
            return entry
    return None


def _is_linked(entry: TierEntry | None) -> bool:
    return entry is not None and entry.parent is not None
