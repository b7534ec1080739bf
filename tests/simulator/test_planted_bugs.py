"""The simulator is only worth something if it catches bugs: each one planted here must be caught.

A bug is a patch of the real classes. Without a patch the same searches pass (they are the tests of
``test_simulator.py``, and ``test_the_searches_pass_without_a_bug`` below).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chunkllama.cache import manager, matching, out_of_sight, retention
from chunkllama.cache.edge import Edge
from chunkllama.cache.eviction import EvictionOrder
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node
from chunkllama.cache.prefix_tree import PrefixTree
from chunkllama.cache.sequence_chunks import SequenceChunks
from chunkllama.cache.tier import Tier
from chunkllama.cache.tier_entry import TierEntry
from chunkllama.scheduler import memory_pressure, starts
from chunkllama.scheduler.admission import AdmissionControl
from chunkllama.scheduler.drafts import Drafts
from chunkllama.scheduler.output import SampledTokens
from chunkllama.scheduler.queue import WaitingQueue
from chunkllama.scheduler.request import Sequence
from chunkllama.scheduler.running import RunningSequences
from chunkllama.scheduler.sequence_lifecycle import SequenceLifecycle
from chunkllama.scheduler.tenants import TenantAccounts
from chunkllama.scheduler.tree_order import TreeOrder
from chunkllama.simulation.engine import SimulatedEngine
from chunkllama.simulation.random_traffic import RandomTraffic
from chunkllama.simulation.tier import SimulatedTier

Patch = pytest.MonkeyPatch
CAUGHT = (AssertionError, IndexError, KeyError, ValueError, AttributeError, TypeError)


def search_traffic() -> None:
    """Random traffic over tiny chunks, invariants after every step, outputs against the oracle."""
    for seed in range(40):
        RandomTraffic(seed, (4, 2, 8, 1)[seed % 4]).run(150)


def search_windows() -> None:
    """The same for a model with a window, which drops chunks."""
    for seed in range(40):
        RandomTraffic(seed, (4, 2, 8, 1)[seed % 4], window=5).run(150)


def search_reserve() -> None:
    """Two requests that fit one after the other, not together: no sequence is preempted."""
    engine = SimulatedEngine(8, 4, max_num_seqs=2, max_num_batched_tokens=32, spare_chunks=0)
    engine.add([0] * 8, 13)
    engine.step()
    engine.add([1] * 8, 13)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions_total == 0


def search_failure() -> None:
    """A leader fails in the very step its followers have joined: its K/V is garbage."""
    engine = SimulatedEngine(40, 4, max_num_seqs=4, max_num_batched_tokens=64)
    base = [0, 1, 1, 0, 1, 0, 0, 0]
    for i in range(4):
        engine.add([*base, *map(int, f"{i:02b}"), 1], 6)
    output = engine.schedule()
    assert output is not None and len(output.slices) == 4
    engine.model.fail_slots = {0}
    engine.commit()
    engine.model.fail_slots = set()
    engine.run()
    engine.check_outputs()
    assert engine.errors == {"r0": "model_nan"}


def search_hand_over() -> None:
    """A leader is aborted in the middle of a prefix that two others wait for."""
    engine = SimulatedEngine(40, 4, max_num_seqs=4, max_num_batched_tokens=6, min_wait_tokens=2)
    base = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0]
    names = [engine.add([*base, *map(int, f"{i:02b}"), 1], 6) for i in range(3)]
    engine.step()
    engine.scheduler.abort(names[0])
    engine.run()
    engine.check_outputs({names[0]})


def search_pins() -> None:
    """A pinned prefix survives a flood of others for as long as it was promised."""
    engine = SimulatedEngine(8, 4, max_num_seqs=1, max_num_batched_tokens=32)
    engine.add([0] * 8, 1, pin_seconds=1000.0)
    engine.run()
    for i in range(8):
        engine.add([1, *map(int, f"{i:03b}"), *[1] * 8], 4)
    engine.run()
    name = engine.add([0] * 8 + [1], 1)
    engine.run()
    assert engine.cached[name] == 8


def search_starvation() -> None:
    """One prefix is asked for without end while a request with another prefix waits."""
    engine = SimulatedEngine(40, 4, max_num_seqs=1, min_wait_tokens=2, fair_quantum=20)
    engine.add([0] * 9, 2)
    engine.step()
    other = engine.add([1] * 9, 2)
    for i in range(60):
        engine.add([0] * 8 + [1, i % 2], 2)
        engine.step()
    assert other in engine.first_deltas


def search_shares() -> None:
    """A tenant floods while another sends one request; both prefixes are their own."""
    engine = SimulatedEngine(40, 4, max_num_seqs=1, min_wait_tokens=2, fair_quantum=20)
    for i in range(60):
        engine.add([0] * 8 + [1, i % 2], 2, tenant="A", namespace="A")
    engine.add([1] * 9, 2, tenant="B", namespace="B")
    engine.run()
    assert list(engine.first_deltas).index("r60") < 15


# -- bugs ---------------------------------------------------------------------------------------


def missing_incref(patch: Patch) -> None:
    acquire = PrefixTree.acquire_path

    def only_unused(self: PrefixTree, path: list[Node]) -> float:
        return acquire(self, [node for node in path if not node.is_used])

    patch.setattr(PrefixTree, "acquire_path", only_unused)


def unequal_edges_joined(patch: Patch) -> None:
    """A node counts the sequences of another one."""
    patch.setattr(Edge, "may_join", lambda self, below: True)


def publish_one_token_early(patch: Patch) -> None:
    set_next = SequenceChunks.set_next_publish

    def early(self: SequenceChunks, chunk_size: int) -> None:
        set_next(self, chunk_size)
        self.next_publish -= 1

    patch.setattr(SequenceChunks, "set_next_publish", early)


def whole_prompt_matched(patch: Patch) -> None:
    patch.setattr(starts, "match_limit", lambda sequence, limits: sequence.num_tokens)


def double_free(patch: Patch) -> None:
    adopt = CacheManager._adopt

    def twice(
        self: CacheManager, chunks: SequenceChunks, duplicate: Node, own: Node | None
    ) -> None:
        before = int(chunks.ids[chunks.num_whole])
        adopt(self, chunks, duplicate, own)
        self.pool.free(before)

    patch.setattr(CacheManager, "_adopt", twice)


def adopted_chunk_freed_while_read(patch: Patch) -> None:
    """The row goes on reading the chunk that was given back (mini-sglang pull request 142)."""
    adopt = CacheManager._adopt

    def stale(
        self: CacheManager, chunks: SequenceChunks, duplicate: Node, own: Node | None
    ) -> None:
        depth = chunks.num_whole
        before = int(chunks.ids[depth])
        adopt(self, chunks, duplicate, own)
        chunks.ids[depth] = before

    patch.setattr(CacheManager, "_adopt", stale)


def slot_of_a_later_step_read(patch: Patch) -> None:
    """Nodes that a leader will fill some steps later count as there."""
    insert_path = PrefixTree.insert_path

    def promised(self: PrefixTree, *args: object) -> list[Node]:
        path = insert_path(self, *args)
        for node in path:
            node.scheduled = node.num_tokens
        return path

    patch.setattr(PrefixTree, "insert_path", promised)


def unfilled_nodes_left_behind(patch: Patch) -> None:
    """An aborted leader's unfilled nodes stay, and followers wait for no request."""
    patch.setattr(retention, "_cut", lambda tree, node: None)


def followers_of_a_failed_leader_go_on(patch: Patch) -> None:
    patch.setattr(CacheManager, "is_readable", lambda self, chunks: True)
    patch.setattr(CacheManager, "undo_compute", lambda self, chunks, start, end: None)


def handed_over_as_filled(patch: Patch) -> None:
    """What an aborted leader left unfilled is kept as if it were filled."""

    def keep(tree: PrefixTree, node: Node) -> None:
        node.filled = node.scheduled = node.num_tokens

    patch.setattr(retention, "_cut", keep)


def own_path_evictable(patch: Patch) -> None:
    admissions = CacheManager.admissions

    def generous(self: CacheManager, *args: object) -> object:
        everything = self.pool.num_free + self.tree.num_evictable
        for admission in admissions(self, *args):
            yield manager.Admission(
                admission.match, admission.reuses_leaf, admission.num_new, everything
            )

    patch.setattr(CacheManager, "admissions", generous)


def reserve_forgotten(patch: Patch) -> None:
    patch.setattr(AdmissionControl, "reserved", lambda self, running: 0)


def partial_leaf_matched_past_filled(patch: Patch) -> None:
    def overlapping(overlaps: list[tuple[Node, int]]) -> tuple[Node | None, int]:
        return max(overlaps, key=lambda found: found[1], default=(None, 0))

    patch.setattr(matching, "_copy_source", overlapping)


def namespace_leak(patch: Patch) -> None:
    patch.setattr(
        Node, "visible_children", lambda self, namespace: iter(list(self.children.values()))
    )


def public_below_private(patch: Patch) -> None:
    """A public sequence walks into a tenant's nodes."""
    chain = matching._chain

    def everywhere(node: Node, key: bytes, limit: int, namespace: str, size: int) -> list[Node]:
        return max((chain(node, key, limit, n, size) for n in (namespace, "A", "B")), key=len)

    patch.setattr(matching, "_chain", everywhere)


def copy_source_not_held(patch: Patch) -> None:
    patch.setattr(PrefixTree, "add_ref", lambda self, node: None)
    patch.setattr(PrefixTree, "drop_ref", lambda self, node: None)


def used_leaf_taken_over(patch: Patch) -> None:
    admissions = CacheManager.admissions

    def greedy(self: CacheManager, *args: object) -> object:
        for admission in admissions(self, *args):
            if admission.match.copy_source is not None:
                yield manager.Admission(
                    admission.match, True, admission.num_new - 1, admission.available
                )
            else:
                yield admission

    patch.setattr(CacheManager, "admissions", greedy)


def preempted_keeps_its_count(patch: Patch) -> None:
    """A preempted sequence comes back with more tokens computed than it has chunks for."""
    leave = SequenceLifecycle._leave

    def forgetful(self: SequenceLifecycle, sequence: object) -> None:
        computed = sequence.num_computed_tokens
        leave(self, sequence)
        sequence.num_computed_tokens = computed

    patch.setattr(SequenceLifecycle, "_leave", forgetful)
    begin = RunningSequences.start

    def resume(self: RunningSequences, sequence: object, chunks: object, count: int) -> None:
        begin(self, sequence, chunks, max(count, sequence.num_computed_tokens))

    patch.setattr(RunningSequences, "start", resume)


def order_not_repaired(patch: Patch) -> None:
    """After an adoption the sequence stays where it stood."""

    def nothing(self: TreeOrder, sequence: object) -> None:
        self.version += 1

    patch.setattr(TreeOrder, "move", nothing)


def pins_ignored(patch: Patch) -> None:
    patch.setattr(PrefixTree, "pin", lambda self, node: None)
    patch.setattr(PrefixTree, "unpin", lambda self, node: None)
    patch.setattr(PrefixTree, "num_unpinned", lambda self, node: 0)


def spare_chunks_leaked(patch: Patch) -> None:
    release = CacheManager.release

    def leaky(self: CacheManager, chunks: SequenceChunks, *args: object) -> None:
        if len(chunks) > len(chunks.path) + 1:
            chunks.ids = chunks.ids[:-1]
        release(self, chunks, *args)

    patch.setattr(CacheManager, "release", leaky)


def overtaking_without_end(patch: Patch) -> None:
    patch.setattr(
        WaitingQueue,
        "_follower",
        lambda self, queue, passed: queue.follower(self._least_shared, passed),
    )


def charges_lost(patch: Patch) -> None:
    """What a tenant decodes is free."""
    patch.setattr(TenantAccounts, "charge_decoded", lambda self, tenant, tokens: None)


def charged_to_another_tenant(patch: Patch) -> None:
    """The total is right, one tenant's part is not."""

    def wrong(self: TenantAccounts, tenant: str, tokens: int) -> None:
        self.total_charged += tokens

    patch.setattr(TenantAccounts, "charge_computed", wrong)


def shares_not_metered(patch: Patch) -> None:
    """The time that nodes are in use counts for no sequence."""
    patch.setattr(Edge, "shared_seconds", lambda self, now: self.summed_seconds)


def limit_forgotten(patch: Patch) -> None:
    """Requests that end are not subtracted from the running ones of their tenant."""
    stop = SequenceLifecycle._stop

    def leaky(self: SequenceLifecycle, sequence: Sequence) -> SequenceChunks:
        account = self.accounts[sequence.group.request.tenant]
        before = account.num_running
        chunks = stop(self, sequence)
        account.num_running = before
        return chunks

    patch.setattr(SequenceLifecycle, "_stop", leaky)


def tenants_ignored(patch: Patch) -> None:
    patch.setattr(WaitingQueue, "_tenant", lambda self, sequence: "")


def flooder_keeps_its_chunks(patch: Patch) -> None:
    """A tenant's nodes are counted once too often, so the order of eviction is wrong."""
    add = EvictionOrder.add

    def twice(self: EvictionOrder, owner: str) -> None:
        add(self, owner)
        self._owners[owner].num_nodes += 1

    patch.setattr(EvictionOrder, "add", twice)


def wrong_guess_kept(patch: Patch) -> None:
    accept = Drafts.accept

    def keep_all(self: Drafts, sequence: Sequence, sampled: SampledTokens) -> None:
        sampled.accepted[sequence.slot] = [(token, None) for token in sequence.draft.token_ids]
        accept(self, sequence, sampled)

    patch.setattr(Drafts, "accept", keep_all)


def wrong_guess_counts_as_computed(patch: Patch) -> None:
    accept = Drafts.accept

    def count_all(self: Drafts, sequence: Sequence, sampled: SampledTokens) -> None:
        computed = sequence.num_computed_tokens + len(sequence.draft.token_ids)
        accept(self, sequence, sampled)
        sequence.num_computed_tokens = computed

    patch.setattr(Drafts, "accept", count_all)


def tier_keeps_another_chunk(patch: Patch) -> None:
    """What is written is not the chunk that was evicted."""
    write = SimulatedTier.write
    patch.setattr(SimulatedTier, "write", lambda self, entry, chunk: write(self, entry, chunk - 1))


def tier_is_read_from_another_place(patch: Patch) -> None:
    """The chain below a node begins with the prompt's first chunk."""
    chain = Tier.chain

    def first(self: Tier, nodes: list[Node], key: bytes, limit: int, scope: str) -> list[TierEntry]:
        return chain(self, nodes, key, limit, scope) or chain(self, [], key, limit, scope)

    patch.setattr(Tier, "chain", first)


def reads_never_end(patch: Patch) -> None:
    patch.setattr(Tier, "end", lambda self, promotion: None)


def chunk_in_sight_dropped(patch: Patch) -> None:
    hidden = out_of_sight._range

    def more(*args: object) -> tuple[int, int]:
        first, end = hidden(*args)
        return first, end + (end > 0)

    patch.setattr(out_of_sight, "_range", more)


def dropped_though_others_read(patch: Patch) -> None:
    """A sequence gives up nodes from the first that a sequence uses on, not from its own on."""
    hidden = out_of_sight._range
    patch.setattr(out_of_sight, "_range", lambda *args: (0, hidden(*args)[1]))


def shown_without_the_chunks_above(patch: Patch) -> None:
    """A sequence that left the tree publishes what it computes next."""
    drop = memory_pressure.drop_out_of_sight

    def shown(cache: CacheManager, chunks: SequenceChunks, num_computed: int, tenant: str) -> None:
        limit = chunks.insert_limit
        drop(cache, chunks, num_computed, tenant)
        chunks.insert_limit = limit
        chunks.set_next_publish(cache.chunk_size)

    patch.setattr(memory_pressure, "drop_out_of_sight", shown)


BUGS: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (missing_incref, search_traffic),
    (unequal_edges_joined, search_traffic),
    (publish_one_token_early, search_traffic),
    (whole_prompt_matched, search_traffic),
    (double_free, search_traffic),
    (adopted_chunk_freed_while_read, search_traffic),
    (slot_of_a_later_step_read, search_traffic),
    (unfilled_nodes_left_behind, search_hand_over),
    (followers_of_a_failed_leader_go_on, search_failure),
    (handed_over_as_filled, search_hand_over),
    (own_path_evictable, search_traffic),
    (reserve_forgotten, search_reserve),
    (partial_leaf_matched_past_filled, search_traffic),
    (namespace_leak, search_traffic),
    (public_below_private, search_traffic),
    (copy_source_not_held, search_traffic),
    (used_leaf_taken_over, search_traffic),
    (preempted_keeps_its_count, search_traffic),
    (order_not_repaired, search_traffic),
    (pins_ignored, search_pins),
    (spare_chunks_leaked, search_traffic),
    (overtaking_without_end, search_starvation),
    (charges_lost, search_traffic),
    (charged_to_another_tenant, search_traffic),
    (shares_not_metered, search_traffic),
    (limit_forgotten, search_traffic),
    (tenants_ignored, search_shares),
    (flooder_keeps_its_chunks, search_traffic),
    (wrong_guess_kept, search_traffic),
    (wrong_guess_counts_as_computed, search_traffic),
    (tier_keeps_another_chunk, search_traffic),
    (tier_is_read_from_another_place, search_traffic),
    (reads_never_end, search_traffic),
    (chunk_in_sight_dropped, search_windows),
    (dropped_though_others_read, search_windows),
    (shown_without_the_chunks_above, search_windows),
]


@pytest.mark.parametrize(("bug", "search"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
def test_planted_bug_is_caught(
    bug: Callable[[Patch], None], search: Callable[[], None], monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    with pytest.raises(CAUGHT):
        search()


@pytest.mark.parametrize(
    "search",
    [
        search_traffic,
        search_windows,
        search_reserve,
        search_failure,
        search_hand_over,
        search_pins,
        search_starvation,
        search_shares,
    ],
)
def test_the_searches_pass_without_a_bug(search: Callable[[], None]) -> None:
    search()
