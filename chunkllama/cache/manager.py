"""The cache as the scheduler sees it: match, admit, grow, publish, release. Ids come out, no nodes.

A step goes through three moments:

    schedule()   admit / grow, then will_compute() for each slice: its nodes count as `scheduled`,
                 so that sequences admitted after it may join the same step
    (the step runs; nothing is freed, no copy source may go)
    commit()     end_step(), did_compute() for each slice, publish(), release()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from chunkllama.cache import retention
from chunkllama.cache.admissions import Admission, ways_to_admit
from chunkllama.cache.chunk_pool import ChunkPool, ChunkState
from chunkllama.cache.explain import explain_match
from chunkllama.cache.history import PromptHistory
from chunkllama.cache.invariants import check_cache
from chunkllama.cache.matching import Match, find_match
from chunkllama.cache.node import PUBLIC, TOKEN_BYTES, Node, encode_tokens
from chunkllama.cache.pins import Pins
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.cache.sequence_chunks import SequenceChunks
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import ReadLimits, Wait
from chunkllama.cache.usage import ChunkUsage
from chunkllama.messages import CacheExplanation
from chunkllama.tenant_limits import TenantTable

Int32Array = NDArray[np.int32]


class CacheManager:
    """Pool, tree and pins behind one interface.

    Args:
        num_chunks, chunk_size: the pool.
        clock: seconds; pins and chunk-seconds depend on it.
        variant: key of the K/V variant this engine computes (model, adapter, dtype, RoPE).
        history_chunks: chunks of the record of each tenant's prompts, for explanations.
        reach: tokens up to the next one that a step may read; None: all of a sequence.

    Attributes:
        tier: keeps in files what is evicted; None: nothing does.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_size: int,
        clock: Callable[[], float],
        variant: str = "",
        history_chunks: int = 0,
        reach: int | None = None,
    ) -> None:
        self.pool = ChunkPool(num_chunks, chunk_size)
        self.usage = ChunkUsage(clock)
        self.tree = PrefixTree(self.pool, self.usage)
        self.pins = Pins(self.tree, num_chunks // 2)
        self.chunk_size = chunk_size
        self.num_chunks = num_chunks
        self.reach = reach
        self.history = PromptHistory(history_chunks, chunk_size, clock)
        self.tree.on_evicted = self._evicted
        self.tier: Tier | None = None
        self._clock = clock
        self.root = self.tree.root(variant)
        self._copy_sources: list[Node] = []
        self._copying: list[Node] = []

    @property
    def num_available(self) -> int:
        """Chunks that are free or can be evicted now."""
        return self.pool.num_free + self.tree.num_evictable

    # -- admission --------------------------------------------------------------------------

    def match(self, key: bytes, limit: int, namespace: str) -> Match:
        """Longest usable prefix of encoded tokens, at most ``limit``; changes nothing."""
        return find_match(self.root, key, limit, namespace, self.chunk_size)

    def promote(
        self, match: Match, key: bytes, limit: int, namespace: str, limits: ReadLimits
    ) -> Wait | None:
        """Begin to read what continues a match in the first ``limit`` tokens; returns the wait."""
        assert self.tier is not None
        wait = self.tier.promote(match, self.root, key, limit, namespace, limits)
        if wait is not None and wait.promotion is not None:
            for node in reversed(match.nodes):  # they should be there when it has been read
                if node.is_evictable:
                    self.tree.touch(node)
        return wait

    @property
    def has_files(self) -> bool:
        """Something may be found in the tier."""
        return self.tier is not None and self.tier.num_chunks > 0

    @property
    def is_promoting(self) -> bool:
        """Chunks are being read for a sequence."""
        return self.tier is not None and bool(self.tier.promotions)

    def is_pending_node(self, node: Node, tokens: int) -> bool:
        """Tell whether a running sequence still computes the first ``tokens`` of a node."""
        if node.num_sequences == 0:
            return False
        whole = tokens == self.chunk_size
        return (node.scheduled if whole else node.filled) < tokens

    def take_progress(self) -> Iterable[Node]:
        """Return the awaited nodes for which ``is_pending_node`` may have changed since then."""
        progress, self.tree.progress = self.tree.progress, {}
        return progress

    def admissions(self, match: Match, num_chunks: int, namespace: str) -> Iterator[Admission]:
        """Ways to admit a sequence of ``num_chunks`` chunks, the one that keeps most first."""
        available = self.num_available, self.tree.num_evictable_of(match.nodes)
        return ways_to_admit(match, num_chunks, namespace, self.chunk_size, *available)

    def admit(
        self,
        admission: Admission,
        key: bytes,
        namespace: str,
        insert_limit: int,
        tenant: str = "",
    ) -> SequenceChunks:
        """Reference the match, allocate the rest, insert the prompt's chunks as unfilled nodes.

        Args:
            key: every token known of the sequence, encoded.
            insert_limit: leading tokens that others may see.
            tenant: owner of the chunks that it adds.
        """
        match = admission.match
        meter = -self.tree.acquire_path(match.nodes)
        chunks = SequenceChunks(namespace, insert_limit, list(match.nodes), tenant, meter)
        source = match.copy_source
        if source is not None:
            self.tree.add_ref(source)  # allocating may evict
        fresh = self._allocate(admission.num_new, tenant)
        if source is not None and admission.reuses_leaf:
            self.tree.drop_ref(source)
            fresh.insert(0, self.tree.detach(source))
        elif source is not None:
            self._copy_sources.append(source)
            chunks.copies.append((source.chunk_id, fresh[0], match.num_copied))
        chunks.extend(fresh, self._clock())
        self._show_prompt(chunks, key, admission)
        chunks.set_next_publish(self.chunk_size)
        return chunks

    def _show_prompt(self, chunks: SequenceChunks, key: bytes, admission: Admission) -> None:
        """Insert the chunks of the known tokens, unfilled, unless the first exists already."""
        size, match, first = self.chunk_size, admission.match, chunks.num_whole
        parent = chunks.path[-1] if chunks.path else self.root
        width, end = size * TOKEN_BYTES, min(len(key), chunks.insert_limit * TOKEN_BYTES)
        keys = [key[at : min(at + width, end)] for at in range(first * width, end, width)]
        if not keys or self.tree.find_extending(parent, chunks.namespace, keys[0]) is not None:
            return  # an equal chunk is pending: ours is published, or replaced, once it is full
        ids = chunks.ids[first : first + len(keys)].tolist()
        nodes = self.tree.insert_path(parent, chunks.namespace, keys, ids, chunks.tenant)
        chunks.path += nodes
        chunks.meter += len(nodes) * self._clock()
        chunks.num_whole = end // width
        node = nodes[0]
        if match.copy_source is not None and admission.reuses_leaf:
            node.filled = node.scheduled = min(match.num_copied, node.num_tokens)
        elif match.copy_source is not None:
            node.copied_from = (match.copy_source, match.num_copied)
            self._copying.append(node)

    # -- a running sequence -----------------------------------------------------------------

    def grow(self, chunks: SequenceChunks, needed: int, spare: int) -> bool:
        """Append ``needed`` chunks, evicting if need be, and up to ``spare`` that come free.

        False, and nothing changed, if even eviction does not give ``needed``.
        """
        if self.num_available < needed:
            return False
        spare = min(spare, self.num_available - needed)
        chunks.extend(self._allocate(needed + spare, chunks.tenant), self._clock())
        return True

    def will_compute(self, chunks: SequenceChunks, start: int, end: int) -> None:
        """The step being put together computes the sequence's positions [start, end)."""
        size = self.chunk_size
        for node in chunks.path[start // size : (end - 1) // size + 1]:
            node.scheduled = min(node.num_tokens, end - node.depth * size)
            self.tree.progressed(node)

    def did_compute(self, chunks: SequenceChunks, start: int, end: int) -> None:
        """The step has run: K/V of positions [start, end) is there."""
        for node in chunks.path[start // self.chunk_size : (end - 1) // self.chunk_size + 1]:
            node.filled = node.scheduled
            self.tree.progressed(node)
            self.tree.events.stored(node)

    def undo_compute(self, chunks: SequenceChunks, start: int, end: int) -> None:
        """The step failed for this sequence: nothing in [start, end) may be read."""
        for node in chunks.path[start // self.chunk_size : (end - 1) // self.chunk_size + 1]:
            node.scheduled = node.filled

    def is_readable(self, chunks: SequenceChunks) -> bool:
        """Every node the sequence was given to share has been computed, by this step at last."""
        return all(node.scheduled == node.num_tokens for node in chunks.path[: chunks.num_shared])

    def end_step(self) -> None:
        """Drop the references of the step's copies, which are done."""
        for node in self._copy_sources:
            self.tree.drop_ref(node)
        for node in self._copying:
            node.copied_from = None
        self._copy_sources.clear()
        self._copying.clear()

    def publish(self, chunks: SequenceChunks, tokens: Int32Array, num_computed: int) -> bool:
        """Publish chunks that have become full; True if an equal sibling was adopted instead.

        An adopted sibling takes the place of the sequence's own chunk, which is freed: no step
        that reads it is in flight. One that is rounded, or not filled, is looked at again later.
        """
        size, adopted = self.chunk_size, False
        while num_computed >= chunks.next_publish:
            depth = chunks.num_whole
            key = encode_tokens(tokens[depth * size : (depth + 1) * size])
            parent = chunks.path[depth - 1] if depth else self.root
            own = chunks.path[depth] if len(chunks.path) > depth else None
            duplicate = retention.find_duplicate(self.tree, parent, chunks.namespace, key)
            if duplicate is not None:
                if duplicate.filled < size or duplicate.bits:
                    chunks.next_publish = num_computed + 1
                    return adopted
                self._adopt(chunks, duplicate, own)
                adopted = True
            elif own is not None:
                self.tree.rekey(own, key)
                own.filled = own.scheduled = size
                self.tree.events.stored(own)
            else:
                chunk_id = int(chunks.ids[depth])
                node = self.tree.insert(
                    parent, chunks.namespace, key, chunk_id, size, chunks.tenant
                )
                self._append_own(chunks, node)
                self.tree.events.stored(node)
            chunks.num_whole += 1
            chunks.set_next_publish(size)
        return adopted

    def _append_own(self, chunks: SequenceChunks, node: Node) -> None:
        """The sequence's next private chunk has become this node."""
        chunks.meter += self._clock() - self.tree.acquire_path([node])
        chunks.path.append(node)

    def _adopt(self, chunks: SequenceChunks, duplicate: Node, own: Node | None) -> None:
        depth = chunks.num_whole
        if own is None:
            self.pool.free(int(chunks.ids[depth]))
            self._append_own(chunks, duplicate)
        else:
            assert own.num_sequences == 1, "a partial node in two paths"
            chunks.meter -= self.tree.acquire_path([duplicate])
            self.pins.move(own, duplicate)
            chunks.meter += self.tree.release_path([own])
            self.tree.remove(own)
            chunks.path[depth] = duplicate
        chunks.ids[depth] = duplicate.chunk_id

    def fork(self, chunks: SequenceChunks, num_computed: int) -> SequenceChunks | None:
        """A second sequence with the same first ``num_computed`` tokens.

        It shares the whole nodes; every other chunk is copied before the next step. None if the
        pool has no room for the copies.
        """
        assert not chunks.num_dropped, "a beam without all of its chunks"
        size, depth = self.chunk_size, chunks.num_whole
        copied = -(-num_computed // size) - depth
        if self.num_available < copied:
            return None
        path = chunks.path[:depth]
        meter = -self.tree.acquire_path(path)
        child = SequenceChunks(chunks.namespace, chunks.insert_limit, path, chunks.tenant, meter)
        child.extend(self._allocate(copied, chunks.tenant), self._clock())
        for i in range(depth, depth + copied):
            tokens = min(size, num_computed - i * size)
            child.copies.append((int(chunks.ids[i]), int(child.ids[i]), tokens))
        child.set_next_publish(size)
        return child

    def release(self, chunks: SequenceChunks, tokens: Int32Array, num_computed: int) -> None:
        """Release a sequence; what it computed stays cached, its tail as a partial leaf."""
        size = self.chunk_size
        if chunks.copies:  # a fork whose chunks were not copied yet: there is nothing in them
            num_computed = chunks.num_whole * size
        self.publish(chunks, tokens, num_computed)
        end = chunks.insert_limit if chunks.num_dropped else num_computed
        shown = encode_tokens(tokens[:end]) if chunks.insert_limit else b""
        self.record_prompt(chunks, shown)
        depth = chunks.num_whole
        end = min(num_computed, chunks.insert_limit, (depth + 1) * size)
        private = chunks.private_ids
        chunks.meter += len(private) * self._clock()
        tail = None
        if end > depth * size:
            key = encode_tokens(tokens[depth * size : end])
            tail = retention.keep_tail(self.tree, self.root, chunks, key)
            if tail is not None and private and tail.chunk_id == private[0]:
                del private[0]
        chunks.meter += retention.release_path(self.tree, chunks.path)
        self.usage.add_used(chunks.tenant, chunks.meter)
        if tail is not None:
            retention.drop_covered(self.tree, tail)
        for chunk_id in private:
            self.pool.free(chunk_id)

    def discard(self, chunks: SequenceChunks) -> None:
        """Release a sequence and drop everything that it alone computed."""
        self.record_prompt(chunks)
        own = chunks.path[chunks.num_shared :]
        private = chunks.private_ids
        chunks.meter += len(private) * self._clock()
        chunks.meter += self.tree.release_path(own)
        for node in reversed(own):
            if node.is_evictable and not node.children:
                self.tree.remove(node)
        chunks.meter += retention.release_path(self.tree, chunks.path[: chunks.num_shared])
        self.usage.add_used(chunks.tenant, chunks.meter)
        for chunk_id in private:
            self.pool.free(chunk_id)

    # -- memory -----------------------------------------------------------------------------

    def _evicted(self, node: Node) -> None:
        self.history.removed(node, "evicted")
        if self.tier is not None:
            self.tier.evicted(node)

    def _allocate(self, count: int, tenant: str) -> list[int]:
        if (missing := count - self.pool.num_free) > 0:
            self.tree.evict(missing, tenant)
        return self.pool.allocate(count)

    # -- pins -------------------------------------------------------------------------------

    def pin(
        self, tokens: Int32Array, namespace: str, seconds: float, tenant: str, adapter: str = ""
    ) -> bool:
        """Keep what the tree has of ``tokens`` for ``seconds``; False if over the budget."""
        match = self.match(encode_tokens(tokens), len(tokens), namespace)
        source = match.copy_source
        whole = source and match.num_tokens == len(tokens) and source.filled == source.num_tokens
        leaf = source if whole else match.nodes[-1] if match.nodes else None
        until = self._clock() + seconds
        return leaf is None or self.pins.add(leaf, until, tenant, len(tokens), adapter)

    def expire_pins(self) -> None:
        for node, tenant in self.pins.expire(self._clock()):
            self.history.pin_ended(node, tenant)

    def set_tenants(self, limits: TenantTable) -> None:
        """Apply the tenants' shares of the pool and of the pin budget."""
        self.tree.order.set_limits(limits)
        if self.tier is not None:
            self.tier.order.set_limits(limits)
        self.pins.limits = limits

    # -- inspection -------------------------------------------------------------------------

    def explain(
        self, key: bytes, match: Match | None, num_used: int, tenant: str, namespace: str
    ) -> CacheExplanation:
        """Explain why the match of all tokens but the last ended; see ``explain_match``."""
        return explain_match(self.history, self._clock(), tenant, namespace, key, match, num_used)

    def record_prompt(self, chunks: SequenceChunks, ended: bytes = b"") -> None:
        """Record a prompt unless it is there; of a sequence that ``ended``, what it may show."""
        tenant, namespace, prompt = chunks.tenant, chunks.namespace, chunks.unrecorded
        chunks.unrecorded = None
        if prompt is not None and len(prompt[0]) > len(ended):
            self.history.record(tenant, namespace, *prompt)
        if ended:
            self.history.record(tenant, namespace, ended, chunks.insert_limit)

    def check_invariants(self, live: Iterable[SequenceChunks], *, in_step: bool = False) -> None:
        """Check ``cache/invariants.py``, given the chunks of all live sequences."""
        check_cache(self.tree, self.pins, list(live), in_step=in_step)
        self.history.check_invariants()
        if self.tier is not None:
            self.tier.check_invariants()


__all__ = ["PUBLIC", "Admission", "CacheManager", "ChunkState", "Match", "SequenceChunks"]
