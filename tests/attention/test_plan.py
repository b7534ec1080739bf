"""The planner: hand-made trees with their exact items, and what must hold for every plan."""

from __future__ import annotations

import numpy as np
import pytest
from attention_plans import Case, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_blocks import FIXED_CUTS, SHORTEST_FIXED
from chunkllama.attention.plan_format import (
    HEADER_NUM_CLASS0_ITEMS,
    ITEM_MASK,
    ITEM_WINDOW,
    AttentionPlan,
    Packing,
    PlanCapacity,
)

ONE_PIECE = Packing(rows_per_item=64, target_units=1)


def items_of(plan: AttentionPlan) -> list[tuple[int, int, tuple[int, ...], int, int]]:
    """(first row, end row, chunks, first position, flags) of each item; chunks of 16 tokens."""
    found = []
    for row, rows, offset, tokens, first, _, flags, _ in plan.items[: plan.num_items].tolist():
        chunks = tuple(plan.chunk_ids[offset : offset + tokens // 16].tolist())
        found.append((row, row + rows, chunks, first, flags))
    return sorted(found, key=lambda item: (item[3], item[0]))


# a b c d     slice 0: rows 0
# a b c e f   slice 1: rows 1
# a b g       slice 2: rows 2
TREE = [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6]]


def test_a_node_is_one_item_over_the_rows_below_it() -> None:
    case = make_case(TREE, [(63, 1), (66, 1), (32, 1)], chunk_size=16, version=5)
    plan = case.plan(ONE_PIECE)
    assert items_of(plan) == [
        (0, 3, (0, 1), 0, 0),
        (0, 2, (2,), 32, 0),
        (2, 3, (6,), 32, ITEM_MASK),
        (0, 1, (3,), 48, ITEM_MASK),
        (1, 2, (4, 5), 48, ITEM_MASK),
    ]
    assert plan.version == 5
    assert plan.row_flags[:3].tolist() == [0, 0, 0]
    assert np.diff(plan.merge_indptr[:4]).tolist() == [3, 3, 2]


def test_a_lone_sequence_has_one_partial() -> None:
    plan = make_case([[4, 9]], [(20, 1)], chunk_size=16, version=1).plan(ONE_PIECE)
    assert items_of(plan) == [(0, 1, (4, 9), 0, ITEM_MASK)]
    assert plan.row_flags[0] == 1
    assert plan.num_slots == 1


def test_spare_chunks_stay_in_a_decode_plan_and_not_in_a_plan_of_one_step() -> None:
    decode = make_case([[4, 9, 2]], [(5, 1)], chunk_size=16, version=1).plan(ONE_PIECE)
    assert items_of(decode) == [(0, 1, (4, 9, 2), 0, ITEM_MASK)]
    once = make_case([[4, 9, 2]], [(5, 1)], chunk_size=16).plan(ONE_PIECE)
    assert items_of(once) == [(0, 1, (4,), 0, ITEM_MASK)]


def test_spare_chunks_move_no_cut() -> None:
    """They hold nothing yet, so that they cost nothing: the shared run is cut as without them."""
    packing = Packing(rows_per_item=64, target_units=6, min_run_chunks=2)
    shared = list(range(16))

    def cuts(spares: int) -> list[tuple[int, int]]:
        paths = [[*shared, *range(100 * i, 100 * i + 1 + spares)] for i in range(1, 4)]
        case = make_case(paths, [(260, 1)] * 3, chunk_size=16, version=1)
        return [(row, first) for row, _, _, first, _ in items_of(case.plan(packing))]

    assert len(cuts(0)) > 4
    assert cuts(0) == cuts(12)


def test_a_slice_walks_its_private_path_in_one_masked_item_per_row_tile() -> None:
    plan = make_case([[0, 1, 2, 3]], [(8, 40)], chunk_size=16).plan(
        Packing(rows_per_item=24, target_units=1)
    )
    # The first tile ends at position 31, the second at 47: each walks as far as its last row.
    assert items_of(plan) == [(0, 24, (0, 1), 0, ITEM_MASK), (24, 40, (0, 1, 2), 0, ITEM_MASK)]
    assert plan.row_flags[:40].all()


def test_a_follower_sees_what_its_leader_computes_in_the_same_step() -> None:
    # The leader computes positions 8..49, the follower 40..44; they share chunks 0 and 1.
    case = make_case([[0, 1, 2, 3], [0, 1, 5]], [(8, 42), (40, 5)], chunk_size=16)
    assert items_of(case.plan(ONE_PIECE)) == [
        (0, 23, (0, 1), 0, ITEM_MASK),  # leader rows inside the shared run, positions 8..30
        (23, 47, (0, 1), 0, 0),  # from position 31 on they see it whole, like the follower
        (24, 42, (2, 3), 32, ITEM_MASK),
        (42, 47, (5,), 32, ITEM_MASK),
    ]


def test_a_sequence_may_stand_in_two_slices() -> None:
    path = [0, 1, 2]
    case = make_case([path, path], [(10, 6), (16, 20)], chunk_size=16)
    assert items_of(case.plan(ONE_PIECE)) == [
        (0, 6, (0,), 0, ITEM_MASK),
        (6, 26, (0, 1, 2), 0, ITEM_MASK),
    ]


@pytest.mark.parametrize(("first", "second"), [(31, 31), (31, 40), (40, 31)])
def test_a_row_that_stands_in_a_shared_chunk_keeps_it_in_its_tail(first: int, second: int) -> None:
    # Else its tail would grow out of a run that other rows read whole.
    spans = [(first, 1), (second, 1)]
    case = make_case([[0, 1, 2], [0, 1, 3]], spans, chunk_size=16, version=1)
    plan = case.plan(ONE_PIECE)
    assert items_of(plan) == [
        (0, 2, (0,), 0, 0),
        (0, 1, (1, 2), 16, ITEM_MASK),
        (1, 2, (1, 3), 16, ITEM_MASK),
    ]
    check_plan(case, plan, ONE_PIECE)


# ---- windows ---------------------------------------------------------------------------------


def test_a_window_leaves_out_the_chunks_that_no_row_sees() -> None:
    case = make_case(TREE, [(63, 1), (66, 1), (32, 1)], chunk_size=16, version=5)
    # Rows at 63, 66 and 32 see keys from 44, 47 and 13 on.
    plan = case.plan(ONE_PIECE, window=20)
    assert items_of(plan) == [
        (0, 3, (0, 1), 0, ITEM_WINDOW),
        (0, 2, (2,), 32, ITEM_WINDOW),
        (2, 3, (6,), 32, ITEM_MASK | ITEM_WINDOW),
        (0, 1, (3,), 48, ITEM_MASK | ITEM_WINDOW),
        (1, 2, (4, 5), 48, ITEM_MASK | ITEM_WINDOW),
    ]
    assert plan.window == 20
    # Without the third row no row sees chunks 0 and 1.
    case = make_case(TREE[:2], [(63, 1), (66, 1)], chunk_size=16)
    assert items_of(case.plan(ONE_PIECE, window=20)) == [
        (0, 2, (2,), 32, ITEM_WINDOW),
        (0, 1, (3,), 48, ITEM_MASK),
        (1, 2, (4, 5), 48, ITEM_MASK),
    ]
    assert case.plan(ONE_PIECE).window is None


def test_a_prompt_reads_each_row_tile_its_own_window() -> None:
    case = make_case([list(range(8))], [(0, 128)], chunk_size=16)
    plan = case.plan(Packing(rows_per_item=32, target_units=1), window=16)
    chunks = [(item[0], item[2]) for item in items_of(plan)]
    assert chunks == [(0, (0, 1)), (32, (1, 2, 3)), (64, (3, 4, 5)), (96, (5, 6, 7))]


# ---- cutting ---------------------------------------------------------------------------------


def shared_case(rows: int, shared: int, private: int) -> Case:
    prefix = list(range(shared))
    paths = [
        prefix + list(range(shared + i * private, shared + (i + 1) * private)) for i in range(rows)
    ]
    last = (shared + private) * 16 - 1
    return make_case(paths, [(last, 1)] * rows, chunk_size=16, version=1)


@pytest.mark.parametrize(
    ("num_kv_heads", "shared", "pieces"),
    [(3, 64, 2), (8, 16, 1), (1, 64, 8), (3, 8, 1), (1, 24, 3)],
)
def test_cpu_runs_are_the_longest_that_still_give_every_thread_its_units(
    num_kv_heads: int, shared: int, pieces: int
) -> None:
    # Two threads, three units each, nothing private worth the name.
    packing = Packing(rows_per_item=128, target_units=6, num_kv_heads=num_kv_heads)
    plan = shared_case(16, shared, 1).plan(packing)
    assert plan.num_items == pieces + 16


def test_private_runs_are_cut_only_where_the_device_wants_it_and_lacks_units() -> None:
    def private_pieces(rows: int, split_private: bool) -> int:
        packing = Packing(
            target_units=6, num_kv_heads=1, split_private=split_private, min_run_chunks=4
        )
        return shared_case(rows, 0, 64).plan(packing).num_items // rows

    assert private_pieces(1, False) == 1
    assert private_pieces(1, True) == 8
    assert private_pieces(2, True) == 4
    assert private_pieces(16, True) == 1


def test_gpu_packing_cuts_down_to_the_shortest_runs_and_packs_by_group() -> None:
    packing = Packing(
        rows_per_item=16,
        small_rows_per_item=4,
        min_run_chunks=2,
        target_units=396,
        num_kv_heads=8,
        split_private=True,
    )
    plan = shared_case(32, 64, 8).plan(packing)
    units = plan.num_items * 8
    assert 396 <= units < 2 * 396
    classes = plan.items[: plan.num_items, 7]
    assert plan.header[HEADER_NUM_CLASS0_ITEMS] == np.count_nonzero(classes == 0) == 2 * 16


def test_cuts_fall_at_fixed_positions_whoever_shares() -> None:
    def cuts(rows: int, start: int) -> set[int]:
        packing = Packing(min_run_chunks=8, target_units=1 << 20)
        paths = [list(range(start)) + list(range(100, 140)) + [200 + i] for i in range(rows)]
        case = make_case(paths, [(len(paths[0]) * 16 - 1, 1)] * rows, chunk_size=16, version=1)
        plan = case.plan(packing)
        return {f for _, _, _, f, _ in items_of(plan) if f}

    assert cuts(2, 0) == {128, 256, 384, 512, 640}
    assert cuts(5, 0) == cuts(2, 0)
    assert {c for c in cuts(2, 3) if c < 640} == {128, 256, 384, 512}


def test_a_capacity_lengthens_runs_and_refuses_what_cannot_fit() -> None:
    packing = Packing(min_run_chunks=1, target_units=1000)
    case = shared_case(4, 64, 1)
    free = case.plan(packing)
    assert free.num_items == 64 + 4
    tight = PlanCapacity(rows=4, items=12, chunk_ids=128, slots=64)
    plan = case.plan(packing, tight)
    assert plan.capacity == tight
    assert plan.num_items == 12
    check_plan(case, plan, packing)
    with pytest.raises(ValueError, match="capacity"):
        case.plan(packing, PlanCapacity(rows=4, items=4, chunk_ids=128, slots=64))


def test_decode_plans_share_capacities_by_bucket() -> None:
    def capacity(rows: int) -> PlanCapacity:
        return shared_case(rows, 16, 2).plan(Packing()).capacity

    assert capacity(5) == capacity(8)
    assert capacity(8).rows == 8
    assert capacity(9).rows == 16


# ---- what holds for every plan ------------------------------------------------------------------


def check_plan(
    case: Case,
    plan: AttentionPlan,
    packing: Packing,
    positions: np.ndarray | None = None,
    window: int | None = None,
) -> None:
    """Every row reads every key it may see exactly once, appends to its own chunk, and merges in
    order. With a window, every chunk of an item is seen by one of its rows.
    """
    assert plan.window == window
    size = case.chunk_size
    positions = case.positions if positions is None else positions
    paths = [
        path for path, n in zip(case.chunk_ids, case.num_tokens, strict=True) for _ in range(n)
    ]
    items = plan.items[: plan.num_items]
    assert plan.num_rows == len(paths)
    assert plan.num_slots == items[:, 1].sum()
    seen: list[list[tuple[int, int]]] = [[] for _ in paths]
    partials: list[list[tuple[int, int]]] = [[] for _ in paths]
    for row, rows, offset, tokens, first, base, flags, tile_class in items.tolist():
        assert 1 <= rows <= packing.rows_per_item
        assert tile_class == (rows <= packing.small_rows_per_item)
        assert first % size == 0
        assert tokens % size == 0
        own = positions[row : row + rows]
        if flags & ITEM_MASK:
            assert (np.diff(own) >= 0).all()
        unseen = set(range(first, first + tokens, size))
        for r in range(row, row + rows):
            end = min(first + tokens, positions[r] + 1) if flags & ITEM_MASK else first + tokens
            begin = positions[r] + 1 - window if window and flags & ITEM_WINDOW else 0
            for at in range(first, end, size):
                chunk = int(plan.chunk_ids[offset + (at - first) // size])
                assert chunk == paths[r][at // size]
                if begin < at + size:
                    seen[r].append((max(at, begin), min(end, at + size)))
                    unseen.discard(at)
            partials[r].append((first, base + r - row))
        assert window is None or plan.version or not unseen or packing.fixed_runs
    for r, path in enumerate(paths):
        p = int(positions[r])
        low = max(0, p + 1 - window) if window else 0
        expected = [
            (max(low, at), min(p + 1, at + size)) for at in range(low // size * size, p + 1, size)
        ]
        assert sorted(seen[r]) == expected, r
        begin, end = plan.merge_indptr[r : r + 2]
        assert plan.merge_slots[begin:end].tolist() == [slot for _, slot in sorted(partials[r])]
        assert plan.row_flags[r] == (len(partials[r]) == 1)
        offset, first = plan.row_tail[r].tolist()
        assert plan.chunk_ids[offset + (p - first) // size] == path[p // size]
    assert len({slot for row in partials for _, slot in row}) == plan.num_slots
    assert (plan.merge_indptr[plan.num_rows :] == plan.num_slots).all()
    order = [
        (tile_class, -tokens * (packing.chunk_cost_rows + rows))
        for _, rows, _, tokens, _, _, _, tile_class in items.tolist()
    ]
    assert order == sorted(order)
    assert plan.header[HEADER_NUM_CLASS0_ITEMS] == sum(c == 0 for c, _ in order)


SIZE = 4

leaves = st.tuples(
    st.integers(1, 4 * SIZE),  # tokens below the last shared chunk
    st.floats(0, 1, exclude_max=True),  # where the slice begins
    st.floats(0, 1),  # where it ends
    st.integers(0, 2),  # spare chunks
    st.booleans(),  # cut in two
)
trees = st.recursive(
    leaves,
    lambda children: st.tuples(st.integers(0, 5), st.lists(children, min_size=1, max_size=4)),
    max_leaves=8,
)
packings = st.builds(
    Packing,
    rows_per_item=st.sampled_from([4, 5, 16, 64]),
    small_rows_per_item=st.sampled_from([0, 1, 4]),
    min_run_chunks=st.integers(1, 4),
    target_units=st.sampled_from([1, 3, 12, 100]),
    num_kv_heads=st.sampled_from([1, 3]),
    split_private=st.booleans(),
)


def case_of(tree: tuple, decode: bool) -> Case:
    paths: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    fresh = iter(range(100_000))

    def walk(node: tuple, prefix: list[int]) -> None:
        if len(node) == 2:
            run, children = node
            prefix = prefix + [next(fresh) for _ in range(run)]
            for child in children:
                walk(child, prefix)
            return
        tail, begin, end, spares, cut = node
        path = prefix + [next(fresh) for _ in range(-(-tail // SIZE) + spares)]
        total = len(prefix) * SIZE + tail
        if decode:
            paths.append(path)
            spans.append((total - 1, 1))
            return
        first = int(begin * total)
        count = 1 + int(end * (total - first - 1))
        if cut and count > 1:
            paths.extend((path, path))
            spans.extend(((first, count // 2), (first + count // 2, count - count // 2)))
        else:
            paths.append(path)
            spans.append((first, count))

    walk(tree, [])
    return make_case(paths, spans, chunk_size=SIZE, version=3 if decode else 0)


@settings(max_examples=300, deadline=None)
@given(tree=trees, packing=packings)
def test_every_slice_plan_covers_each_visible_key_once(tree: tuple, packing: Packing) -> None:
    case = case_of(tree, decode=False)
    plan = case.plan(packing)
    check_plan(case, plan, packing)
    if packing.target_units == 1:  # no run is cut
        levels = len(set(case.shared) - {0})
        assert np.diff(plan.merge_indptr).max() <= 2 * levels + 1


@settings(max_examples=300, deadline=None)
@given(tree=trees, packing=packings, steps=st.integers(0, 3 * SIZE))
def test_a_decode_plan_stays_right_while_tails_grow(
    tree: tuple, packing: Packing, steps: int
) -> None:
    case = case_of(tree, decode=True)
    plan = case.plan(packing)
    ends = np.array([len(path) * SIZE - 1 for path in case.chunk_ids])
    check_plan(case, plan, packing, np.minimum(case.positions + steps, ends))
    # A chunk is read once per row tile of those below it.
    for chunk in range(case.num_chunks):
        readers = sum(chunk in path for path in case.chunk_ids)
        reads = sum(chunk in item[2] for item in chunks_read(plan))
        assert reads == -(-readers // packing.rows_per_item)


@settings(max_examples=200, deadline=None)
@given(tree=trees, packing=packings, decode=st.booleans(), window=st.integers(1, 30))
def test_every_plan_covers_each_key_of_a_window_once(
    tree: tuple, packing: Packing, decode: bool, window: int
) -> None:
    case = case_of(tree, decode=decode)
    check_plan(case, case.plan(packing, window=window), packing, window=window)


@settings(max_examples=100, deadline=None)
@given(tree=trees, packing=packings, steps=st.integers(0, 3 * SIZE), window=st.integers(1, 30))
def test_a_decode_plan_with_a_window_stays_right_while_tails_grow(
    tree: tuple, packing: Packing, steps: int, window: int
) -> None:
    case = case_of(tree, decode=True)
    plan = case.plan(packing, window=window)
    ends = np.array([len(path) * SIZE - 1 for path in case.chunk_ids])
    positions = np.minimum(case.positions + steps, ends)
    check_plan(case, plan, packing, positions, window=window)


def chunks_read(plan: AttentionPlan) -> list[tuple[int, int, list[int]]]:
    return [
        (row, rows, plan.chunk_ids[offset : offset + tokens // SIZE].tolist())
        for row, rows, offset, tokens, *_ in plan.items[: plan.num_items].tolist()
    ]


def test_rows_256_and_many_levels() -> None:
    """A chain of sharers, each leaving the path one chunk later than the one before."""
    depth = 256
    trunk = list(range(depth))
    paths = [[*trunk[: depth - i], 1000 + i] for i in range(depth)]
    spans = [((len(path) - 1) * 16 + 3, 1) for path in paths]
    case = make_case(paths, spans, chunk_size=16, version=1)
    packing = Packing(rows_per_item=64, target_units=1)
    check_plan(case, case.plan(packing), packing)


def test_inputs_that_only_a_bug_can_make() -> None:
    with pytest.raises(AssertionError):
        Planner(Packing(), 48)
    with pytest.raises(AssertionError, match="one token per slice"):
        make_case([[0]], [(0, 2)], chunk_size=16, version=1).plan(Packing())


# ---- fixed runs --------------------------------------------------------------------------------

long_trees = st.recursive(
    leaves,
    lambda children: st.tuples(st.integers(0, 30), st.lists(children, min_size=1, max_size=3)),
    max_leaves=6,
)
fixed_packings = st.builds(
    Packing,
    rows_per_item=st.sampled_from([4, 5, 64]),
    target_units=st.sampled_from([1, 100]),
    split_private=st.booleans(),
    fixed_runs=st.just(True),
)


def test_fixed_cuts_lie_closer_than_an_eighth_of_what_is_before_them() -> None:
    lengths = np.diff(FIXED_CUTS)
    assert FIXED_CUTS[:3].tolist() == [0, 8, 16] and FIXED_CUTS[-1] >= 1 << 26
    assert (lengths % SHORTEST_FIXED == 0).all() and (lengths[:16] == SHORTEST_FIXED).all()
    assert (lengths[1:] <= np.maximum(FIXED_CUTS[1:-1] / 8, SHORTEST_FIXED)).all()
    assert np.searchsorted(FIXED_CUTS, 2048) == 48


@settings(max_examples=100, deadline=None)
@given(
    tree=long_trees,
    packing=fixed_packings,
    decode=st.booleans(),
    window=st.none() | st.integers(1, 200),
)
def test_the_fixed_runs_of_a_row_follow_from_its_position(
    tree: tuple, packing: Packing, decode: bool, window: int | None
) -> None:
    """One partial for each run between two cuts that has a key of the row, shared or not."""
    case = case_of(tree, decode)
    plan = case.plan(packing, window=window)
    check_plan(case, plan, packing, window=window)
    runs: list[list[int]] = [[] for _ in range(case.num_rows)]
    for row, rows, _, tokens, first, _, _, _ in plan.items[: plan.num_items].tolist():
        begin, end = first // SIZE, (first + tokens) // SIZE
        run = int(np.searchsorted(FIXED_CUTS, begin, side="right")) - 1
        assert end <= FIXED_CUTS[run + 1] and begin % SHORTEST_FIXED == 0
        assert window or begin == FIXED_CUTS[run]
        for r in range(row, row + rows):
            position = int(case.positions[r])
            if first <= position and (not window or first + tokens > position + 1 - window):
                runs[r].append(run)
    for position, found in zip(case.positions.tolist(), runs, strict=True):
        keys = np.arange(max(0, position + 1 - window) if window else 0, position + 1) // SIZE
        assert sorted(found) == sorted(set(np.searchsorted(FIXED_CUTS, keys, side="right") - 1))


def test_fixed_runs_are_shared_up_to_the_last_cut_before_a_branch() -> None:
    shared = list(range(21))
    case = make_case([[*shared, 30 + i] for i in range(3)], [(21 * 16, 1)] * 3, chunk_size=16)
    items = items_of(case.plan(Packing(fixed_runs=True)))
    assert [(row, end, first) for row, end, _, first, _ in items] == [
        (0, 3, 0),
        (0, 3, 8 * 16),
        *((i, i + 1, 16 * 16) for i in range(3)),
    ]


@settings(max_examples=50, deadline=None)
@given(tree=long_trees, packing=fixed_packings, steps=st.integers(0, 3 * SIZE))
def test_fixed_runs_stay_right_while_tails_grow(tree: tuple, packing: Packing, steps: int) -> None:
    case = case_of(tree, decode=True)
    ends = np.array([len(path) * SIZE - 1 for path in case.chunk_ids])
    check_plan(case, case.plan(packing), packing, np.minimum(case.positions + steps, ends))
