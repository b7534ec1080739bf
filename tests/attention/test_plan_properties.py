"""Plans of random trees, also of fixed runs and of windows, hold what every plan must."""

from __future__ import annotations

import numpy as np
from attention_plans import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_checks import SIZE, case_of, check_plan, items_of, leaves, packings, trees

from chunkllama.attention.plan_blocks import FIXED_CUTS, SHORTEST_FIXED
from chunkllama.attention.plan_format import AttentionPlan, Packing

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
