"""What must hold for every plan, and random trees to plan for."""

from __future__ import annotations

import numpy as np
from attention_plans import Case, make_case
from hypothesis import strategies as st

from chunkllama.attention.plan_format import (
    HEADER_NUM_CLASS0_ITEMS,
    ITEM_MASK,
    ITEM_WINDOW,
    AttentionPlan,
    Packing,
)


def items_of(plan: AttentionPlan) -> list[tuple[int, int, tuple[int, ...], int, int]]:
    """(first row, end row, chunks, first position, flags) of each item; chunks of 16 tokens."""
    found = []
    for row, rows, offset, tokens, first, _, flags, _ in plan.items[: plan.num_items].tolist():
        chunks = tuple(plan.chunk_ids[offset : offset + tokens // 16].tolist())
        found.append((row, row + rows, chunks, first, flags))
    return sorted(found, key=lambda item: (item[3], item[0]))


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
