"""Blocks of an attention plan, row ranges times chunk ranges, and how they are cut by rows and by
windows.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

# A block is a row range times a chunk range, before it is cut into items: (row_begin, num_rows,
# chunk_begin, chunk_end, chunk_offset, position, private). `position` is that of its first row (the
# rows of a masked block are consecutive tokens), or WHOLE where every row sees every key.
Block = tuple[int, int, int, int, int, int, int]
BLOCK_ROW: Final = 0
BLOCK_ROWS: Final = 1
BLOCK_BEGIN: Final = 2
BLOCK_END: Final = 3
BLOCK_OFFSET: Final = 4
BLOCK_POSITION: Final = 5
WHOLE: Final = 1 << 40

SHORTEST_FIXED: Final = 8


def _fixed_cuts() -> Int64Array:
    cuts = [0]
    while cuts[-1] < 1 << 26:
        cuts.append(cuts[-1] + max(SHORTEST_FIXED, 1 << max(cuts[-1].bit_length() - 4, 0)))
    return np.array(cuts, np.int64)


# Where runs are cut with ``Packing.fixed_runs``: every 8 chunks up to the 128th, then at longer
# distances, an eighth to a sixteenth of what lies before, so that long rows have few partials.
FIXED_CUTS: Final = _fixed_cuts()


def cut_rows(blocks: Int64Array, most: int) -> tuple[Int64Array, Int64Array]:
    """Cut blocks [7, N] into tiles [7, M] of at most ``most`` rows.

    Returns the tiles, and [M] the number of rows of the largest tile of the same block.
    """
    count = -(-blocks[BLOCK_ROWS] // most)
    skipped = nth(count) * most
    largest = np.repeat(np.minimum(blocks[BLOCK_ROWS], most), count)
    tiles = np.repeat(blocks, count, axis=1)
    tiles[BLOCK_ROW] += skipped
    tiles[BLOCK_ROWS] = np.minimum(tiles[BLOCK_ROWS] - skipped, most)
    tiles[BLOCK_POSITION] += np.where(tiles[BLOCK_POSITION] < WHOLE, skipped, 0)
    return tiles, largest


def within_window(
    tiles: Int64Array, first_key: Int64Array, chunk_size: int, unit: int
) -> tuple[Int64Array, NDArray[np.bool_], Int64Array]:
    """Take the chunks before all windows of its rows out of each of the tiles [7, M].

    Args:
        first_key: [R] position of the first key in each row's window.
        unit: tiles begin at multiples of so many chunks.

    Returns:
        The tiles that some row sees, [M] which of ``tiles`` these are, and for each of them the key
        from which on every row sees everything.
    """
    row, rows = tiles[BLOCK_ROW], tiles[BLOCK_ROWS]
    # reduceat takes interval bounds; every second result is of what lies between two intervals.
    bounds = np.stack((row, row + rows), axis=1).ravel()
    padded = np.append(first_key, first_key[-1])
    lowest = np.minimum.reduceat(padded, bounds)[::2]
    highest = np.maximum.reduceat(padded, bounds)[::2]
    cut = np.maximum(lowest // (chunk_size * unit) * unit - tiles[BLOCK_BEGIN], 0)
    tiles[BLOCK_BEGIN] += cut
    tiles[BLOCK_OFFSET] += cut
    seen = tiles[BLOCK_BEGIN] < tiles[BLOCK_END]
    return tiles[:, seen], seen, highest[seen]


def nth(counts: Int64Array) -> Int64Array:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
