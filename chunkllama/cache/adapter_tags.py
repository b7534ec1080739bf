"""Token ids under an adapter: the same token computed under two adapters has two ids in the tree.

K and V at a position follow from the tokens up to it and from the adapter that was active at each
of them. So the tree's key has both: the upper bits of an id are the number of the adapter, 0 for
the base model. Everything that compares keys then tells adapters apart: a plain adapter has a tree
of its own, and an activated one shares the base model's chunks, token by token, up to where it
becomes active.

A number stands for one load of an adapter, whose files are checked against their hash whenever they
are read again; it is given to another one only after every chunk under it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunkllama.cache.node import TOKEN_BYTES

TOKEN_BITS: Final = 20
MAX_VOCABULARY: Final = 1 << TOKEN_BITS
MAX_ADAPTERS: Final = (1 << 31 - TOKEN_BITS) - 1

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A sequence's adapter.

    Attributes:
        number: of the adapter, from 1.
        start: the first position at which it is active.
    """

    number: int
    start: int

    def tagged(self, tokens: Int32Array) -> Int32Array:
        """Return a sequence's token ids, from its first one on, as the tree knows them."""
        result = tokens.copy()
        result[self.start :] |= self.number << TOKEN_BITS
        return result


def adapter_of(key: bytes) -> int:
    """Return the number of the adapter at a key's last token; 0 is none."""
    return int.from_bytes(key[-TOKEN_BYTES:], "big") >> TOKEN_BITS


def untagged(token_ids: list[int]) -> list[int]:
    """Return ids as the model knows them."""
    return [token & (MAX_VOCABULARY - 1) for token in token_ids]
