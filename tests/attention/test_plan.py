"""The planner: hand-made trees with their exact items; test_plan_properties.py has random ones."""

from __future__ import annotations

import numpy as np
import pytest
from attention_plans import Case, make_case
from plan_checks import check_plan, items_of

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import (
    HEADER_NUM_CLASS0_ITEMS,
    ITEM_MASK,
    ITEM_WINDOW,
    Packing,
    PlanCapacity,
)

ONE_PIECE = Packing(rows_per_item=64, target_units=1)


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
