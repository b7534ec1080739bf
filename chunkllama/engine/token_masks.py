"""Masks of tokens: bit t of an int32 array [ceil(vocab / 32)] is that of token t."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bit(token_id: int) -> int:
    """Return the bit of a token in its 32-bit word, as a signed number."""
    bit = 1 << (token_id % 32)
    return bit - (1 << 32) if bit >> 31 else bit


def allow(mask: NDArray[np.int32], token_id: int) -> None:
    """Set the bit of a token in a mask."""
    mask[token_id // 32] |= np.int32(bit(token_id))


def forbid(mask: NDArray[np.int32], token_id: int) -> None:
    """Clear the bit of a token in a mask."""
    mask[token_id // 32] &= ~np.int32(bit(token_id))


def is_allowed(mask: NDArray[np.int32], token_id: int) -> bool:
    """Return whether the bit of a token is set; it is not for one beyond the mask."""
    return token_id // 32 < len(mask) and bool(int(mask[token_id // 32]) >> (token_id % 32) & 1)


def token_ids_of(mask: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the ids of the tokens in a mask, in ascending order."""
    words = np.flatnonzero(mask)
    at = np.flatnonzero(np.unpackbits(mask[words].view(np.uint8), bitorder="little"))
    token_ids: NDArray[np.int64] = words[at >> 5] * 32 + (at & 31)
    return token_ids


def mask_of(token_ids: NDArray[np.int64], num_words: int) -> NDArray[np.int32]:
    """Return the mask of some tokens."""
    flags = np.zeros(num_words * 32, bool)
    flags[token_ids] = True
    return np.packbits(flags, bitorder="little").view(np.int32)
