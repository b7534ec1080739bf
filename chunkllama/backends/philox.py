"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as
easy as 1, 2, 3").

A number is a function of its key and counter alone, so a draw depends neither on what else is in
the batch nor on how often the step is repeated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]  # each holds 32 bits
IntArray = NDArray[np.int64]


def philox4x32(counter: list[Words], key: list[Words]) -> list[Words]:
    """Four words of 32 random bits for each 128-bit counter and 64-bit key, elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def gumbels(
    seeds: list[int], choices: list[int], positions: list[int], stream: int, lanes: IntArray
) -> NDArray[np.float32]:
    """Standard Gumbel numbers [R, L] of rows keyed by seed, choice index and output position.

    Args:
        stream: 0 or 1, for two independent families.
        lanes: [R, 1 or more] int64, each the first of four neighbouring numbers of its row.
    """
    shape = lanes.shape
    seed = np.array([[value & 0xFFFF_FFFF_FFFF_FFFF] for value in seeds], np.uint64)
    columns = [positions, choices]
    counter = [np.broadcast_to(np.array(c, np.uint64)[:, None], shape) for c in columns]
    counter += [lanes.astype(np.uint64), np.full(shape, stream, np.uint64)]
    keys = [np.broadcast_to(word, shape) for word in (seed & _LOW, seed >> _WORD)]
    words = np.stack(philox4x32(counter, keys), axis=2).reshape(shape[0], -1)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log(uniform))).astype(np.float32)
