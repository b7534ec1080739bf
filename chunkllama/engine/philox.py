"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as
easy as 1, 2, 3").

A number is a function of its key and counter alone, so a draw is the same whatever else is in the
batch and however often the step is repeated.
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


def philox4x32(counter: list[Words], key: list[Words]) -> list[Words]:
    """Four words of 32 random bits for each 128-bit counter and 64-bit key, elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def uniforms(seeds: list[int], choices: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, choice index, output position), with 53 random bits."""
    seed = np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in seeds], np.uint64)
    zero = np.zeros_like(seed)
    counter = [np.array(positions, np.uint64), np.array(choices, np.uint64), zero, zero]
    high, low, _, _ = philox4x32(counter, [seed & _LOW, seed >> _WORD])
    bits = (high << np.uint64(21)) | (low >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
