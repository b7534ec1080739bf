"""Draw tokens from the masks of grammars."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def is_allowed(mask: NDArray[np.int32], token_id: int) -> bool:
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def draw(mask: NDArray[np.int32], rng: random.Random) -> int:
    """One of the tokens of a mask [words]; all are drawn equally often."""
    for _ in range(4):  # where most are allowed, as inside strings, there is no need to list them
        token_id = rng.randrange(32 * len(mask))
        if is_allowed(mask, token_id):
            return token_id
    words = np.flatnonzero(mask)
    bits = np.unpackbits(mask[words].view(np.uint8), bitorder="little")
    at = int(rng.choice(np.flatnonzero(bits)))
    return int(words[at >> 5]) * 32 + (at & 31)
